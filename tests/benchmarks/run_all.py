"""Every benchmark of this folder in its long form, one after the other, then the table: make bench."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

if __name__ == "__main__":
    for script in [*sorted(HERE.glob("bench_*.py")), HERE / "table.py"]:
        print(f"-- {script.name}", flush=True)
        subprocess.run([sys.executable, str(script), *sys.argv[1:]], check=True)
