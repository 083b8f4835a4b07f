"""The part of a log that says what went wrong."""

from __future__ import annotations

import errno
import os
import re
import signal
from pathlib import Path

_TAIL_BYTES = 64 * 1024
_MAX_TRACEBACK_LINES = 200
_RANK_PREFIX = re.compile(r"^\[?(?:rank|default)\s?\d+\]?:\s?")
_AGENT_LINE = re.compile(r"^[IWE]\d{4} \d\d:\d\d:\d\d")
_AGENT_VERDICT = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
_KILLED = (-signal.SIGKILL, -signal.SIGTERM)
_TRACEBACK = "Traceback (most recent call last):"
# "ValueError: ...", "tinker_hpc.errors.WeightsError: ...", the last words of a worker's rank; not torch's own summary
# of another process's failure.
_ERROR_LINE = re.compile(
    r"^worker rank \d+ ends: .*|^(?!.*ChildFailedError)[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)\b.*"
)


def read_tail(path: Path, *, since: int = 0) -> str:
    """The last 64 KiB of a log as text, nothing before byte `since`; "" if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(since, file.tell() - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def last_traceback(text: str) -> str | None:
    """The last Python traceback in a log, to the end of the log; None if there is none (pure)."""
    start = text.rfind(_TRACEBACK)
    if start < 0:
        return None
    # A chained exception ("During handling of the above ...") is one story: begin at its first part.
    while (before := text.rfind(_TRACEBACK, 0, start)) >= 0 and _is_chained(text[before:start]):
        start = before
    return "\n".join(text[start:].rstrip().splitlines()[:_MAX_TRACEBACK_LINES])


def _is_chained(between: str) -> bool:
    return "During handling of the above exception" in between or "direct cause of the following" in between


def error_line(text: str) -> str | None:
    """The line that names the error, e.g. "ValueError: no such file"; None if no line looks like one (pure)."""
    for line in reversed(text.splitlines()):
        bare = _RANK_PREFIX.sub("", line.strip())
        if _ERROR_LINE.match(bare):
            return bare
    return None


def worker_words(text: str) -> str:
    """Why ranks ended, from the log they share with torch's elastic agent (pure).

    The agent's own lines and its closing traceback say only that a rank failed; the rank's words stand before them.
    """
    kills = [(int(code), rank) for code, rank in _AGENT_VERDICT.findall(text) if int(code) < 0]
    ranks_own = text[: text.rfind(_TRACEBACK)] if "ChildFailedError" in text[text.rfind(_TRACEBACK) :] else text
    ranks_own = "\n".join(line for line in ranks_own.splitlines() if not _AGENT_LINE.match(line))
    said = error_line(ranks_own) or last_lines(ranks_own, 3) or "no word in its log"
    if not kills:
        return said
    code, rank = kills[-1]
    name = {number.value: number.name for number in signal.Signals}.get(-code, f"signal {-code}")
    hint = ", most likely for want of memory" if -code == signal.SIGKILL else ""
    return f"local rank {rank} was ended by {name}{hint}; the last error in the log: {said}"


def num_failed_starts(text: str) -> int:
    """How often the agent saw its ranks fail by themselves, or be killed by a signal of their own making (pure).

    Not those that somebody killed: they would have got ready.
    """
    return sum(int(code) not in _KILLED for code, _ in _AGENT_VERDICT.findall(text))


def were_killed(text: str) -> bool:
    """Whether the ranks' last failure in the agent's log is that somebody killed one (pure)."""
    failures = _AGENT_VERDICT.findall(text)
    return bool(failures) and int(failures[-1][0]) in _KILLED


def disk_refused(text: str) -> bool:
    """Whether a log says that the disk was full, over quota or read-only (pure)."""
    return any(os.strerror(number) in text for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))


def last_lines(text: str, count: int = 15) -> str:
    """The last lines that are not empty, each once (pure)."""
    lines = [line for line in text.splitlines() if line.strip()][-count:]
    return "\n".join(dict.fromkeys(lines))  # ranks and restarts say the same words again
