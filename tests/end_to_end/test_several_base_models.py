"""A run with two base models: a worker, that is a job, for each, and all of them end with the run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import process_tree
from launch.job_state import JobState
from launch.submitted import SubmittedJob
from tinker_hpc.errors import ConfigError, LoopFailedError, UnknownBaseModelError
from tinker_hpc.private_files import read_json
from tinker_hpc.run_folder import RunFolder
from tinker_hpc.runs import Run
from tinker_hpc.submission import submit

TINY = Path(__file__).resolve().parents[1] / "models" / "tiny-qwen3"


@pytest.fixture(autouse=True)
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data root of its own, and after each test nothing of it that still runs."""
    monkeypatch.setenv("TINKER_HPC_DATA_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("TINKER_HPC_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("TINKER_HPC_CONFIG", str(tmp_path / "config.toml"))
    (tmp_path / "config.toml").write_text(f'cluster = "local"\n[base_models]\n"Qwen/Qwen3-8B" = "{TINY}"\n')
    yield tmp_path / "root"
    runs = tmp_path / "root" / "runs"
    names = [path.name for path in runs.iterdir()] if runs.exists() else []
    ended = within(40, lambda: not any(process_tree.of_run(name) for name in names))
    for name in names:
        process_tree.end_run(name, grace_s=2)
    assert ended, "processes of an ended run were still there"


def within(timeout_s: float, condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """Another base model: the tiny one's weights under another name."""
    return Path(shutil.copytree(TINY, tmp_path / "teacher"))


PROGRAM = """
import sys
import tinker

service = tinker.ServiceClient()
student = service.create_lora_training_client(base_model="Qwen/Qwen3-8B", rank=4).result()
teacher = service.create_sampling_client(base_model=sys.argv[1]).result()
tokens = student.get_tokenizer().encode("What is 27 + 46? It is 73.")
datum = tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]),
                     loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)})
before = student.forward([datum], "cross_entropy").result()
student.forward_backward([datum], "cross_entropy").result()
student.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
after = student.forward([datum], "cross_entropy").result().metrics["loss:sum"]
told = teacher.compute_logprobs(tinker.ModelInput.from_ints(tokens)).result()[1:]
gap = max(abs(a - b) for a, b in zip(before.loss_fn_outputs[0]["logprobs"].tolist(), told, strict=True))
print("GAP", gap, "LOSS", before.metrics["loss:sum"], after)
assert gap < 1e-4 and after < before.metrics["loss:sum"]
"""


@pytest.mark.slow
def test_student_and_teacher_in_one_run(data_root: Path, tmp_path: Path, teacher: Path) -> None:
    program = tmp_path / "distil.py"
    program.write_text(PROGRAM)
    options = ["--base-model", "Qwen/Qwen3-8B", "--base-model", str(teacher), "--name", "two"]
    done = subprocess.run(
        [sys.executable, "-m", "tinker_hpc.cli", "run", *options, "--", "python", str(program), str(teacher)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GAP" in done.stdout
    (run,) = (Run(path.name) for path in (data_root / "runs").iterdir() if not path.name.endswith("-w1"))
    declared = [read_json(worker.declaration)["base_model"] for worker in run.folder.workers()]
    assert declared == ["Qwen/Qwen3-8B", str(teacher)]
    assert len(run.metrics()) == 1
    further = Run(f"{run.id}-w1")
    assert within(90, lambda: further.status().finished)
    assert further.status().state is JobState.COMPLETED, "asked to close, not killed"


def asks_for(base_model: str) -> str:
    import tinker

    service = tinker.ServiceClient()
    service.create_lora_training_client(base_model=base_model, rank=4).result()
    return "made"


@pytest.mark.slow
def test_a_worker_that_cannot_start_fails_only_what_waits_for_it(teacher: Path) -> None:
    (teacher / "model.safetensors").write_bytes(b"not tensors")
    runs = [submit(asks_for, str(model), base_model=[str(TINY), str(teacher)]) for model in (TINY, teacher)]
    assert runs[0].result(timeout=150) == "made"
    with pytest.raises(LoopFailedError, match=r"(?s)safetensors|SafetensorError|header") as caught:
        runs[1].result(timeout=150)
    assert "of the worker ended" in str(caught.value)


def sleeps() -> None:
    time.sleep(600)


def test_workers_end_with_a_run_that_was_cancelled_or_killed(teacher: Path) -> None:
    cancelled, killed = (submit(sleeps, base_model=[str(TINY), str(teacher)]) for _ in range(2))
    further = [Run(f"{run.id}-w1") for run in (cancelled, killed)]
    assert within(120, lambda: all(run.events() for run in (cancelled, killed, *further)))
    cancelled.cancel()
    assert within(90, lambda: further[0].status().finished and cancelled.status().finished)
    # The whole job at once, as a dead node would: nobody is left to write an outcome or to ask for a close.
    for pid in process_tree.of_run(killed.id):
        os.kill(pid, signal.SIGKILL)
    assert within(90, lambda: further[1].status().finished)
    assert f"run {killed.id} ended" in further[1].status().reason
    assert not killed.folder.outcome.exists()


def test_a_refused_run_leaves_nothing(data_root: Path, teacher: Path) -> None:
    def left() -> list[str]:
        return os.listdir(data_root / "runs") if (data_root / "runs").exists() else []

    with pytest.raises(UnknownBaseModelError, match="no/such-model"):
        submit(sleeps, base_model=[str(TINY), "no/such-model"])
    with pytest.raises(ConfigError, match="named twice"):
        submit(sleeps, base_model=["Qwen/Qwen3-8B", str(TINY)])
    with pytest.raises(ConfigError, match="no base model"):
        submit(sleeps, base_model=[])
    assert left() == []


def test_the_job_folder_of_a_further_worker_is_reached_through_the_run(tmp_path: Path) -> None:
    run = RunFolder.new(tmp_path / "root", "two")
    run.worker(0).create(base_model="a", base_model_folder="/a")
    further = run.add_worker_run(1)
    assert [folder.path.name for folder in run.workers()] == ["0"], "not before it is declared"
    further.worker(0).create(base_model="b", base_model_folder="/b")
    assert [read_json(folder.declaration)["base_model"] for folder in run.workers()] == ["a", "b"]
    assert [folder.run_id for folder in run.worker_runs()] == [f"{run.run_id}-w1"]
    moved = Path(shutil.move(tmp_path / "root", tmp_path / "moved"))
    assert len(list(RunFolder(moved / "runs" / run.run_id).workers())) == 2
    assert SubmittedJob.of(further) is None
