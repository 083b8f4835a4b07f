"""An unmodified RL recipe of tinker-cookbook on a real Slurm: its whole job is killed three times, and it ends with the
same rewards, adapter and optimizer as the one that nobody touched, to the bit.

The recipe is `rl_loop`, one question a batch: then one sample request is in flight at a time, and nothing depends on
which answers happened to be decoded side by side. It gives no seeds; the run's own is fixed with PYTHONHASHSEED, so
that there is something to compare with. Run by hand (`make slurm-long`, `make cookbook-env` before it): ten minutes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from slurm_machine import PROGRAMS, REPOSITORY, TINY_MODEL, SlurmCluster, until
from test_slurm_continues import nothing_left, status_of

from tinker_hpc.run_folder import checkpoint_folder

COOKBOOK = REPOSITORY / ".venv-cookbook" / "bin" / "python"
MODEL = "Qwen/Qwen3-8B"
NUM_STEPS = 10
KILLED_AT = (2, 5, 8)
"""Steps of the recipe after which the job is killed."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def home(cluster_session: SlurmCluster) -> Iterator[Path]:
    """The user's side: a base model that earns some reward, its hub name, and a folder named like the dataset."""
    if not COOKBOOK.exists():
        pytest.skip(f"{COOKBOOK.parent.parent.name} is not there: make cookbook-env")
    home = cluster_session.home("alice")
    base = home / "boxed-base"
    program = REPOSITORY / "tests" / "cookbook" / "programs" / "boxed_base.py"
    words = [str(COOKBOOK), str(program), str(TINY_MODEL), str(base), MODEL, "30"]
    made = cluster_session.script("exec", "env", "OMP_NUM_THREADS=2", *words, check=False, timeout_s=900)
    assert made.returncode == 0, made.stderr[-3000:]
    rows = [(a, b) for a in (1, 2, 3) for b in (1, 2, 3) if 3 <= a + b <= 5] * 2
    dataset = home / "openai" / "gsm8k"
    dataset.mkdir(parents=True)
    lines = [{"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"} for a, b in rows]
    (dataset / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:NUM_STEPS]))
    (dataset / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: train.jsonl\n---\n"
    )
    config = home / ".config" / "tinker_hpc" / "config.toml"
    config.write_text(config.read_text() + f'\n[base_models]\n"{MODEL}" = "{base}"\n')
    owner = home.stat()
    for path in (base, home / "openai"):
        for each in [path, *path.rglob("*")]:
            os.chown(each, owner.st_uid, owner.st_gid)
    yield home
    for path in (base, home / "openai"):
        shutil.rmtree(path)


def start(cluster: SlurmCluster, name: str, *, save_every: int) -> dict[str, Any]:
    """Submit the recipe as a user would, with nothing of it changed."""
    recipe = [
        "-m",
        "tinker_cookbook.recipes.rl_loop",
        f"model_name={MODEL}",
        f"log_path={cluster.home('alice') / name}",
    ]
    sizes = ["batch_size=1", "group_size=8", "max_tokens=8", "learning_rate=1e-3", "lora_rank=8"]
    options = {"base_model": MODEL, "name": name, "resources": {"memory": "4G", "time": 30}}
    done = cluster.as_user(
        "alice", "env", "PYTHONHASHSEED=11", sys.executable, str(PROGRAMS / "act.py"), "submit", json.dumps(options),
        str(COOKBOOK), *recipe, *sizes, f"save_every={save_every}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads(done.stdout.splitlines()[-1])
    assert "error" not in run, run
    return {**run, "name": name}


def rewards_of(cluster: SlurmCluster, run: dict[str, Any]) -> dict[int, set[str]]:
    """What the recipe itself wrote so far: by step, the reward, once for each other number it ever had."""
    path = cluster.home("alice") / run["name"] / "metrics.jsonl"
    rewards: dict[int, set[str]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        if "reward/total" in row:
            rewards.setdefault(row["step"], set()).add(repr(row["reward/total"]))
    return rewards


def ended(cluster: SlurmCluster, run: dict[str, Any]) -> tuple[dict[int, set[str]], str]:
    """Wait for the end: the rewards, and a hash of what was saved last."""
    outcome = cluster.run_folder(run["run_id"]) / "outcome.json"
    until(outcome.exists, timeout_s=1800, what="the end of the run")
    result = cluster.act("alice", "result", run["run_id"], timeout_s=280)
    log = (cluster.run_folder(run["run_id"]) / "logs" / "loop.log").read_text()
    assert result.get("error") is None, f"{result.get('message')}\n{log[-3000:]}"
    folder = cluster.home("alice") / run["name"]
    last = json.loads((folder / "checkpoints.jsonl").read_text().splitlines()[-1])
    assert last["name"] == "final"
    model_id, kind, name = last["state_path"].removeprefix("tinker://").split("/")
    digest = hashlib.sha256()
    saved = checkpoint_folder(cluster.home("alice") / "tinker_hpc_data", model_id, kind, name)
    for path in sorted(saved.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            digest.update(f"{path.name} {sorted(file.metadata().items())}".encode())
            for key in sorted(file.keys()):
                digest.update(key.encode() + file.get_tensor(key).tobytes())
    return rewards_of(cluster, run), digest.hexdigest()


def kill_the_job(cluster: SlurmCluster, run: dict[str, Any], after: Sequence[int]) -> None:
    """SIGKILL to every process of whatever job the run has, once it has taken so many optimizer steps."""
    for count in after:
        until(lambda count=count: len(rewards_of(cluster, run)) >= count, timeout_s=600, what=f"{count} steps")
        job_id = until(
            lambda: cluster.slurm("squeue", "-h", "-n", run["run_id"], "-t", "R", "-o", "%A").split(),
            timeout_s=60,
            what="a running job",
        )[0]
        cluster.slurm("scancel", "-f", "-s", "KILL", job_id)
        until(
            lambda job_id=job_id: job_id not in cluster.slurm("squeue", "-h", "-t", "R", "-o", "%A").split(),
            timeout_s=60,
            what=f"the end of job {job_id}",
        )


def test_three_kills_of_the_whole_job(cluster: SlurmCluster, home: Path) -> None:
    rewards, state = ended(cluster, start(cluster, "calm", save_every=2))
    assert sorted(rewards) == list(range(NUM_STEPS)) and all(len(once) == 1 for once in rewards.values())
    assert len(set.union(*rewards.values())) > 2, "some answers were right and some wrong: there was something to learn"

    print(f"\nrewards {[float(next(iter(rewards[step]))) for step in range(NUM_STEPS)]}, state {state[:16]}")

    # Without checkpoints of its own it begins at its beginning, and is given the recorded answers.
    run = start(cluster, "replayed", save_every=0)
    kill_the_job(cluster, run, KILLED_AT)
    assert ended(cluster, run) == (rewards, state)
    assert len(status_of(cluster, run)["job_ids"]) >= 4
    nothing_left(cluster, run)
    log = (cluster.run_folder(run["run_id"]) / "logs" / "gateway.log").read_text()
    assert "left the recorded path" not in log

    # With them it goes back to its last one, and asks the steps since then again: the draws are the same.
    run = start(cluster, "resumed", save_every=2)
    kill_the_job(cluster, run, KILLED_AT)
    assert ended(cluster, run) == (rewards, state)
    assert "Resuming from batch" in (cluster.run_folder(run["run_id"]) / "logs" / "loop.log").read_text()
