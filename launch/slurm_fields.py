"""Single values as Slurm prints them -> Python values (pure). Shared by squeue, sacct and scontrol.

Times are unix seconds because host.py sets SLURM_TIME_FORMAT=%s for every command.
"""

from __future__ import annotations

import re

_NOT_A_VALUE = {"", "N/A", "Unknown", "None", "None assigned", "(null)", "INVALID", "NONE"}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}


def text(value: str) -> str:
    """The value, or "" where Slurm prints one of its words for nothing."""
    value = value.strip()
    return "" if value in _NOT_A_VALUE else value


def unix_time(value: str) -> float | None:
    """Unix seconds, or None."""
    value = value.strip()
    return float(value) if value.isdigit() and int(value) > 0 else None


def duration_s(value: str) -> float | None:
    """Seconds of `12:34`, `1:02:03`, `2-01:02:03` or plain seconds; None for anything else."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)(?:\.\d+)?", value.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def exit_and_signal(value: str) -> tuple[int | None, int | None]:
    """`3:0` -> (3, None), `0:9` -> (0, 9). sacct masks the code with 0x7f; 0:125 is its out-of-memory."""
    match = re.fullmatch(r"(\d+):(\d+)", value.strip())
    if match is None:
        return None, None
    return int(match.group(1)), int(match.group(2)) or None


def memory_bytes(value: str) -> int | None:
    """`2932K`, `1.5G`, `0` -> bytes; None for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTP]?)", value.strip())
    return int(float(match.group(1)) * _UNITS[match.group(2)]) if match else None


def gpu_count(tres: str) -> int:
    """GPUs in `billing=1,gres/gpu:a100=4,gres/gpu=4`: the untyped entry is the sum of the typed ones."""
    counts = dict(part.split("=", 1) for part in tres.split(",") if "=" in part)
    if "gres/gpu" in counts:
        return int(counts["gres/gpu"])
    return sum(int(count) for name, count in counts.items() if name.startswith("gres/gpu:"))


def node_names(value: str) -> tuple[str, ...]:
    """`node[1-2,4],gpu07` -> ("node1", "node2", "node4", "gpu07"); "" -> ()."""
    value = text(value)
    names: list[str] = []
    # A comma inside brackets separates ranges, outside it separates names.
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", value):
        names += _expand(part)
    return tuple(names)


def _expand(part: str) -> list[str]:
    """One name with any number of bracket groups."""
    match = re.search(r"\[([^\]]*)\]", part)
    if match is None:
        return [part]
    before, after = part[: match.start()], part[match.end() :]
    middles: list[str] = []
    for item in match.group(1).split(","):
        low, _, high = item.partition("-")
        if not high:
            middles.append(low)
        else:
            middles += [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
    return [name for middle in middles for name in _expand(before + middle + after)]
