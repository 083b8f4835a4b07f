"""Draw docs/learning.svg: run the tests that learn, keep their curves in docs/curves, one panel each.

python docs/draw_learning.py            runs the tests first (about four minutes on two quiet cores)
python docs/draw_learning.py --redraw   from the curves there are
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
CURVES = DOCS / "curves"
TESTS = ("tests/end_to_end/test_recipes_learn.py", "tests/cookbook/test_learning.py")
ORDER = ("sft", "rl", "dpo", "distillation")


def run_tests() -> None:
    """Each tier by itself: they have a conftest each."""
    CURVES.mkdir(exist_ok=True)
    environment = {**os.environ, "TINKER_HPC_CURVES": str(CURVES)}
    for test in TESTS:
        subprocess.run([sys.executable, "-m", "pytest", test, "-q", "-s"], cwd=DOCS.parent, env=environment, check=True)


def draw() -> None:
    """One row of panels as SVG, text as text."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tinker_hpc"})
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(9, 5.6), layout="constrained")
    for name, axes in zip(ORDER, panels.flat, strict=True):
        curve = json.loads((CURVES / f"{name}.json").read_text())
        axes.plot(range(len(curve["values"])), curve["values"], linewidth=1.4)
        axes.set(title=curve["title"], ylabel=curve["ylabel"], xlabel="optimizer step")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
    figure.savefig(DOCS / "learning.svg", metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redraw", action="store_true", help="do not run the tests")
    if not parser.parse_args().redraw:
        run_tests()
    draw()
