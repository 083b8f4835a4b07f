"""Programs of the stock SDK that a test runs by itself, outside of a run, where nothing helps them to end."""

from __future__ import annotations

import os
from pathlib import Path

_LOOP_START = Path(__file__).parents[1] / "launch" / "loop_start"


def python_path(*folders: Path) -> str:
    """PYTHONPATH for such a program: threads of the SDK's HTTP client abort one in some fifty that are done, and a loop
    in a run is spared that (launch/loop_start/sitecustomize.py). The program itself is as it was.
    """
    return os.pathsep.join(map(str, (_LOOP_START, *folders)))
