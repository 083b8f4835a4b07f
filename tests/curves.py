"""What the tests that learn leave for docs/draw_learning.py: their curves, where TINKER_HPC_CURVES names a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path


def record(name: str, title: str, ylabel: str, values: Sequence[float]) -> None:
    """Write one curve, a value an optimizer step, as JSON; nothing without the variable."""
    folder = os.environ.get("TINKER_HPC_CURVES")
    if folder:
        curve = {"title": title, "ylabel": ylabel, "values": [round(value, 5) for value in values]}
        (Path(folder) / f"{name}.json").write_text(json.dumps(curve) + "\n")
