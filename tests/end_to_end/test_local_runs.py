"""submit, Run, sessions and the command line over real jobs of the local executor, and what is left when they end.

Most loops here do not train: what is tested is how values, errors, signals and exit codes travel.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import process_tree
from launch.job_state import JobState
from tinker_hpc.errors import (
    JobCancelledError,
    JobFailedError,
    LoopFailedError,
    SerializationError,
    SessionError,
    UnknownBaseModelError,
)
from tinker_hpc.run_folder import RunFolder
from tinker_hpc.runs import Run
from tinker_hpc.sessions import Session
from tinker_hpc.submission import submit

TINY = str(Path(__file__).resolve().parents[1] / "models" / "tiny-qwen3")
TINKER_HPC = [sys.executable, "-m", "tinker_hpc.cli"]


@pytest.fixture(autouse=True)
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data root of its own, and after each test nothing of it that still runs."""
    monkeypatch.setenv("TINKER_HPC_DATA_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("TINKER_HPC_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-configuration"))
    monkeypatch.setenv("TINKER_HPC_CLUSTER", "local")
    yield tmp_path / "root"
    runs = tmp_path / "root" / "runs"
    names = [path.name for path in runs.iterdir()] if runs.exists() else []
    left = wait_for(lambda: not any(process_tree.of_run(name) for name in names), 30)
    if not left:
        for name in names:
            process_tree.end_run(name, grace_s=2)
    assert left, "processes of an ended run were still there"


def wait_for(condition, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def cli(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TINKER_HPC, *argv], capture_output=True, text=True, timeout=120, check=False)


def double(n: int, *, offset: int = 0) -> dict[str, object]:
    print("the loop's own words")
    return {"value": 2 * n + offset, "url": os.environ["TINKER_BASE_URL"], "cwd": os.getcwd()}


async def later(n: int) -> int:
    await asyncio.sleep(0.05)
    return n + 1


def fails(reason: str) -> None:
    raise KeyError(reason)


def returns_a_lock() -> object:
    return {"loss": 0.5, "lock": threading.Lock()}


def kills_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleeps() -> None:
    print("asleep", flush=True)
    time.sleep(600)


def test_a_value_comes_back_here_and_in_another_process() -> None:
    started = time.monotonic()
    run = submit(double, 20, base_model=TINY, offset=2, name="double")
    assert time.monotonic() - started < 30, "submit waits for nothing"
    value = run.result(timeout=60)
    assert value["value"] == 42 and value["cwd"] == os.getcwd()
    assert value["url"].startswith("http://127.0.0.1:")
    assert run.logs() == "the loop's own words\n"
    code = (
        "import json, sys, tinker_hpc\nrun = tinker_hpc.Run(sys.argv[1])\n"
        "print(json.dumps([run.result(timeout=60)['value'], run.done()]))"
    )
    done = subprocess.run([sys.executable, "-c", code, run.id], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [42, True]
    assert wait_for(lambda: run.status().slurm_state == "COMPLETED", 30), "the job ends soon after its loop"
    assert run.status().finished
    assert run.status().state is JobState.COMPLETED
    (listed,) = json.loads(cli("ls", "--json").stdout)
    assert (listed["id"], listed["state"]) == (run.id, "COMPLETED")


def test_two_runs_are_awaited_together() -> None:
    async def both() -> list[object]:
        runs = [submit(later, n, base_model=TINY) for n in (1, 2)]
        return await asyncio.gather(*runs)

    assert asyncio.run(both()) == [2, 3]


def test_an_exception_comes_back_with_its_traceback_and_logs() -> None:
    run = submit(fails, "reward", base_model=TINY)
    with pytest.raises(LoopFailedError) as caught:
        run.result(timeout=60)
    error = caught.value
    assert isinstance(error.__cause__, KeyError) and error.__cause__.args == ("reward",)
    assert "raise KeyError(reason)" in error.remote_traceback
    assert "KeyError: 'reward'" in Path(error.log_paths[0]).read_text()
    assert wait_for(lambda: run.status().slurm_state == "FAILED", 30)
    assert run.status().exit_code == 1


def test_a_return_value_that_does_not_pickle() -> None:
    with pytest.raises(LoopFailedError, match=r"the return value\['lock'\] is a _thread\.lock") as caught:
        submit(returns_a_lock, base_model=TINY).result(timeout=60)
    assert isinstance(caught.value.__cause__, SerializationError)


def test_a_loop_that_dies_without_a_word() -> None:
    with pytest.raises(JobFailedError, match="exit code 137"):
        submit(kills_itself, base_model=TINY).result(timeout=60)


def test_cancel_ends_the_future_and_everything() -> None:
    run = submit(sleeps, base_model=TINY)
    assert wait_for(lambda: "asleep" in run.logs(), 60)
    run.cancel()
    assert process_tree.of_run(run.id) == []
    with pytest.raises(JobCancelledError, match="cancelled on request"):
        run.result(timeout=60)
    assert run.status().state is JobState.CANCELLED
    run.cancel()


def test_a_dead_job_ends_the_future() -> None:
    """Every process of the run is killed at once: a machine that went away."""
    run = submit(sleeps, base_model=TINY)
    assert wait_for(lambda: "asleep" in run.logs(), 60)
    while pids := [*process_tree.of_run(run.id), int(json.loads(run.folder.submitted.read_text())["job_id"])]:
        alive = [pid for pid in pids if process_tree.identity(pid)]
        if not alive:
            break
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    with pytest.raises(JobFailedError, match="left no outcome"):
        run.result(timeout=60)


def test_run_ends_as_the_program_did(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nprint('out', flush=True)\nprint('err', file=sys.stderr)\nsys.exit(int(sys.argv[1]))\n"
    )
    done = cli("run", "--base-model", TINY, "--", "python", str(program), "7")
    assert done.returncode == 7
    assert set(done.stdout.split()) == {"out", "err"}
    assert "ended with exit code 7" in done.stderr and "Traceback" not in done.stderr
    # From a folder whose files are called like modules that all our processes import.
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("queue.py", "torch.py", "numpy.py"):
        (folder / name).write_text("raise RuntimeError('shadowed')\n")
    script = str(Path(sys.executable).with_name("tinker-hpc"))
    argv = [script, "run", "--base-model", TINY, "--json", "--", "python", str(program), "0"]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    first, last = (json.loads(line) for line in done.stdout.splitlines())
    assert done.returncode == 0
    assert first["id"] == last["id"] and last["state"] == "COMPLETED" and last["exit_code"] == 0
    assert cli("logs", first["id"]).stdout.split() == ["out", "err"]
    logs = Run(first["id"]).log_paths
    assert "worker-0" in logs and not [name for name in logs if "shadowed" in Run(first["id"]).logs(name)]


def test_a_detached_run_is_followed_and_cancelled_by_others(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import time\nprint('one', flush=True)\ntime.sleep(600)\n")
    done = cli("run", "--base-model", TINY, "--detach", "--json", "--", "python", str(program))
    run_id = json.loads(done.stdout)["id"]
    follower = subprocess.Popen([*TINKER_HPC, "logs", "-f", run_id], stdout=subprocess.PIPE, text=True)
    assert follower.stdout is not None and follower.stdout.readline() == "one\n"
    cancelled = json.loads(cli("cancel", run_id, "--json").stdout)
    assert cancelled == {"id": run_id, "cancelled": True, "state": "CANCELLED"}
    assert follower.wait(timeout=60) == 0
    follower.stdout.close()
    assert json.loads(cli("status", run_id, "--json").stdout)["state"] == "CANCELLED"
    with pytest.raises(JobCancelledError):
        Run(run_id).result(timeout=60)


def healthy(base_url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{base_url}/api/v1/healthz", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_served_session_ends_with_its_client(data_root: Path, how: signal.Signals) -> None:
    """Also by SIGKILL: the keeper notices, and nothing waits for a client that is gone."""
    client = subprocess.Popen(
        [*TINKER_HPC, "serve", "--base-model", TINY, "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert client.stdout is not None
    line = json.loads(client.stdout.readline())
    assert set(line) == {"session_id", "base_url", "api_key"} and line["api_key"].startswith("tml-")
    assert healthy(line["base_url"])
    assert wait_for(lambda: bool(process_tree.of_run(line["session_id"])), 30)
    client.send_signal(how)
    code = client.wait(timeout=60)
    assert code == (0 if how is not signal.SIGKILL else -9)
    client.stdout.close()
    assert wait_for(lambda: not process_tree.of_run(line["session_id"]) and not healthy(line["base_url"]), 30)
    folder = RunFolder(data_root / "runs" / line["session_id"])
    assert json.loads(folder.worker(0).status.read_text())["phase"] == "ended"


def test_a_second_base_model_gets_a_worker_of_its_own(data_root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    with Session() as session:
        first = session.serve(TINY)
        assert session.serve(f"{TINY}/") == first == session.id
        second = session.serve(str(other))
        assert second != first
        declared = [json.loads(worker.declaration.read_text())["base_model"] for worker in session.folder.workers()]
        assert declared == [TINY, str(other)]
        assert session.folder.worker(1).path.resolve() == RunFolder(data_root / "runs" / second).worker(0).path
        with pytest.raises(UnknownBaseModelError):
            session.serve("no/such-model")
    for run_id in (first, second):
        assert Run(run_id).status().state is JobState.CANCELLED, "they were still loading"
    with pytest.raises(SessionError, match="is closed"):
        session.serve(TINY)


def test_a_session_that_nobody_closed_says_that_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    """The SDK would ask its gateway for ever, and a worker would have no keeper."""
    with Session() as session:
        session._keeper.terminate()
        assert wait_for(lambda: session.closed and not healthy(session.base_url), 60)
        with pytest.raises(SessionError, match=r"is over: the session's keeper was ended by SIGTERM \(log"):
            session.serve(TINY)
        assert wait_for(lambda: f"{session.id} is over: the session's keeper was ended" in caplog.text, 10)
    assert not session.folder.spec.exists(), "no job was submitted"


DROP_IN = """
import sys
import tinker_hpc as tinker

client = tinker.ServiceClient()
training = client.create_lora_training_client(base_model=sys.argv[1], rank=4).result()
tokens = training.get_tokenizer().encode("a drop-in")
datum = tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]),
                     loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)})
before = training.forward_backward([datum], "cross_entropy").result().metrics["loss:sum"]
training.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
after = training.forward([datum], "cross_entropy").result().metrics["loss:sum"]
path = training.save_weights_for_sampler("final").result().path
assert tinker.ServiceClient()._hpc_session is client._hpc_session
sampler = client.create_sampling_client(model_path=path).result()
answer = sampler.sample(tinker.ModelInput.from_ints(tokens), 1, tinker.SamplingParams(max_tokens=3)).result()
print(before, after, len(answer.sequences[0].tokens), path)
"""


@pytest.mark.slow
def test_import_tinker_hpc_as_tinker_without_a_server(tmp_path: Path) -> None:
    """No TINKER_BASE_URL: the client starts a gateway and a worker, and both end with the process."""
    env = {name: value for name, value in os.environ.items() if name not in ("TINKER_BASE_URL", "TINKER_API_KEY")}
    done = subprocess.run(
        [sys.executable, "-c", DROP_IN, TINY], capture_output=True, text=True, timeout=300, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    before, after, num_tokens, path = done.stdout.split()
    assert float(after) < float(before) and int(num_tokens) >= 1
    (listed,) = json.loads(cli("ls", "--json").stdout)
    assert (listed["kind"], listed["state"]) == ("session", "COMPLETED")
    (saved,) = json.loads(cli("checkpoints", listed["id"], "--json").stdout)
    assert saved["path"] == path
    exported = json.loads(cli("export", path, "--to", str(tmp_path / "adapter"), "--json").stdout)
    assert json.loads((Path(exported["folder"]) / "adapter_config.json").read_text())["r"] == 4
    assert len(json.loads(cli("metrics", listed["id"], "--json").stdout)) == 1
