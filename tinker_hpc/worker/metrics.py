"""metrics.jsonl: a line per optimizer step, written by rank 0, read by `tinker-hpc metrics` and `plot`.

A convenience and not the truth (results in the log are): no fsync, and a reader skips a last line that is cut short.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinker_hpc.private_files import PRIVATE_FILE, write_bytes
from tinker_hpc.worker.sampler_gap import SamplerGap

NO_GAP = SamplerGap()


@dataclass
class StepMetrics:
    """Sums over the backward passes since the last optimizer step."""

    loss_sum: float = 0.0
    num_loss_tokens: int = 0
    """Tokens with a weight or an advantage that is not 0."""
    num_tokens: int = 0
    pass_seconds: float = 0.0
    gap_total: float = 0.0
    gap_largest: float = 0.0
    gap_tokens: int = 0
    """A `SamplerGap` in plain numbers, as the others go into a snapshot."""

    def add(
        self, *, loss_sum: float, num_loss_tokens: int, num_tokens: int, seconds: float, gap: SamplerGap = NO_GAP
    ) -> None:
        self.loss_sum += loss_sum
        self.num_loss_tokens += num_loss_tokens
        self.num_tokens += num_tokens
        self.pass_seconds += seconds
        gap = SamplerGap(self.gap_total, self.gap_largest, self.gap_tokens) + gap
        self.gap_total, self.gap_largest, self.gap_tokens = gap.total, gap.largest, gap.num_tokens

    def line(
        self,
        model_id: str,
        step: int,
        optimizer: Mapping[str, float],
        learning_rate: float,
        seconds: float,
        *,
        seq: int,
    ) -> dict[str, Any]:
        """The line for optimizer step number `step` (from 1), request `seq`.

        `loss_per_token` is None without loss tokens, `sampler_gap_mean` and `_max` without sampled ones.
        """
        return {
            "time": time.time(),
            "model_id": model_id,
            "step": step,
            "seq": seq,
            "loss_per_token": self.loss_sum / self.num_loss_tokens if self.num_loss_tokens else None,
            "loss_sum": self.loss_sum,
            "num_loss_tokens": self.num_loss_tokens,
            "num_tokens": self.num_tokens,
            "sampler_gap_mean": self.gap_total / self.gap_tokens if self.gap_tokens else None,
            "sampler_gap_max": self.gap_largest if self.gap_tokens else None,
            "grad_norm": optimizer.get("grad_norm:mean"),
            "learning_rate": learning_rate,
            "pass_time_s": self.pass_seconds,
            "optim_time_s": seconds,
        }


class MetricsFile:
    """Appends lines. A restarted worker takes the same steps again (redo), and leaves out what is there already.

    Lines of steps that the loop took back are removed at the start.
    """

    def __init__(self, path: Path, taken_back: frozenset[int] = frozenset()) -> None:
        """Args: taken_back: `seq` of requests. Raises: DataRootError if the file must and cannot be written anew."""
        self._path = path
        lines = read_metrics(path)
        kept = [line for line in lines if line.get("seq") not in taken_back]
        if len(kept) < len(lines):
            write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._already = {line.get("seq") for line in kept}
        self._cut_short = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0

    def append(self, line: Mapping[str, Any]) -> None:
        """Add the line of request `seq`.

        A disk that refuses costs the line, not the step: the same numbers are in the result log.
        """
        if line["seq"] in self._already:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        text = ("\n" if self._cut_short else "") + json.dumps(finite) + "\n"
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE_FILE)
            try:
                os.write(descriptor, text.encode())
            finally:
                os.close(descriptor)
        except OSError:
            return
        self._cut_short = False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines, [] while there is no file."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # cut short by a kill
            continue
    return lines
