"""A loop that is started again draws what it drew the first time, whatever kind of program it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch.children import loop_environment
from launch.job_spec import JobSpec
from tinker_hpc.config import ClusterProfile

DRAWS = """
import json, os, random, subprocess, sys
import numpy as np
own = [random.random(), float(np.random.rand()), hash("x")]
mine = "import random, json; print(json.dumps(random.random()))"
children = [json.loads(subprocess.check_output([sys.executable, "-c", mine])) for _ in range(2)]
print(json.dumps([own, children, os.environ.get("PYTHONPATH"), getattr(sys, "of_the_site", None)]))
"""


def drawn(run_id: str, **environ: str) -> Any:
    """What a program of that run draws; its children; the PYTHONPATH it sees; what a site's own start left."""
    spec = JobSpec(run_id, "run", "r", "m", "/m", ClusterProfile("della"))
    given = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | environ
    env = loop_environment(spec, given, base_url="http://127.0.0.1:1", api_key="tml-x")
    return json.loads(subprocess.check_output([sys.executable, "-c", DRAWS], env=env))


def test_every_start_of_one_run_draws_the_same(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.of_the_site = True\n")
    first = drawn("r-1")
    again = drawn("r-1", PYTHONPATH=str(tmp_path))
    assert again[0] == first[0] != drawn("r-2")[0]
    assert drawn("r-2", PYTHONHASHSEED="7")[0] == drawn("r-3", PYTHONHASHSEED="7")[0]
    assert len({*first[1], *again[1]}) == 4, "what the loop starts does not draw alike"
    assert first[2:] == [None, None] and again[2:] == [str(tmp_path), True], "nothing of the user's is hidden"
