"""A loop that is started again draws what it drew the first time, whatever kind of program it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sdk_programs import python_path

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


SDK = """
import asyncio, atexit, sys, threading, types

async def ask():
    try:
        await asyncio.sleep(60)
    finally:
        print("cancelled", flush=True)

loop = asyncio.new_event_loop()
holder = types.SimpleNamespace(_loop=loop, _thread=threading.Thread(target=loop.run_forever, daemon=True))
module = types.SimpleNamespace(_internal_client_holder_thread_singleton=holder)
sys.modules["tinker.lib.internal_client_holder"] = module
holder._thread.start()
asyncio.run_coroutine_threadsafe(ask(), loop)
atexit.register(lambda: print("the program's own end", flush=True))
raise SystemExit(3)
"""


def in_a_run() -> dict[str, str]:
    spec = JobSpec("r-1", "run", "r", "m", "/m", ClusterProfile("della"))
    return loop_environment(spec, os.environ, base_url="http://127.0.0.1:1", api_key="tml-x")


@pytest.mark.parametrize("env", [in_a_run(), {**os.environ, "PYTHONPATH": python_path()}], ids=["in a run", "alone"])
def test_what_the_sdk_still_asks_for_is_cancelled_last_and_the_exit_code_stays(env: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", SDK], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines() == ["the program's own end", "cancelled"]


def test_the_stock_sdk_has_what_is_looked_for() -> None:
    from tinker.lib.internal_client_holder import _internal_client_holder_thread_singleton as holder

    assert {"_loop", "_thread"} <= vars(holder).keys()
