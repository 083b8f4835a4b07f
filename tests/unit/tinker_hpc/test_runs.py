"""submit()'s arguments, and what a Run makes of the files of a run that is over."""

from __future__ import annotations

import asyncio
import functools
import json
import shutil
from pathlib import Path

import pytest

from launch.job_spec import JobSpec
from tinker_hpc.config import ClusterProfile, build_config
from tinker_hpc.errors import (
    ConfigError,
    JobCancelledError,
    JobFailedError,
    JobTimeLimitError,
    LoopFailedError,
    SerializationError,
    UnknownBaseModelError,
    UnknownClusterError,
    UnknownRunError,
)
from tinker_hpc.payload import dump_error, dump_success
from tinker_hpc.private_files import write_bytes, write_json
from tinker_hpc.run_folder import RunFolder
from tinker_hpc.runs import Run
from tinker_hpc.submission import check_call, submit

MODEL = Path(__file__).parents[2] / "models" / "tiny-qwen3"
OURS = {"base_model": "m", "cluster": None, "nodes": None, "name": None, "time": None}


def train(steps, rate=1e-4):
    return steps * rate


def wants_name(name, steps=1):
    return name


def wants_base_model(base_model, steps=1):
    return base_model


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "ours"),
    [
        (train, (5,), {}, {}),
        (train, (5,), {"rate": 1.0}, {}),
        (wants_name, ("x",), {}, {"name": "sft"}),
        (wants_base_model, ("m",), {}, {}),
        (functools.partial(wants_base_model, base_model="m"), (), {}, {}),
        (lambda *args, **kwargs: None, (1, 2), {"a": 3}, {}),
        (len, ([],), {}, {}),
    ],
)
def test_unambiguous_calls_pass(function, args, kwargs, ours) -> None:
    check_call(function, args, kwargs, {**OURS, **ours})


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "ours", "words"),
    [
        (wants_name, (), {}, {"name": "sft"}, "wants_name.. has a parameter 'name', and submit.. keeps"),
        (wants_base_model, (), {"steps": 2}, {}, "has a parameter 'base_model'"),
        (train, (), {}, {}, "missing a required argument: 'steps'.*submit.. keeps these"),
        (train, (1,), {"gpu_per_node": 4}, {}, "unexpected keyword argument 'gpu_per_node'.*submit.. keeps these"),
        (train, (1, 2, 3), {}, {}, "too many positional"),
    ],
)
def test_other_calls_are_refused_before_any_job(function, args, kwargs, ours, words) -> None:
    with pytest.raises(ConfigError, match=words):
        check_call(function, args, kwargs, {**OURS, **ours})


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINKER_HPC_DATA_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("TINKER_HPC_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("TINKER_HPC_CONFIG", raising=False)
    return tmp_path / "root"


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"base_model": "no/such-model"}, UnknownBaseModelError, "no/such-model"),
        ({"base_model": "m", "cluster": "nowhere"}, UnknownClusterError, "nowhere"),
        ({"base_model": "MODEL", "nodes": 0}, ConfigError, "nodes is 0"),
        ({"base_model": "MODEL", "nodes": 2}, ConfigError, "nodes is 2"),
        ({"base_model": "MODEL", "tp_size": 3}, ConfigError, "tp_size is 3"),
        ({"base_model": "MODEL", "time": "soon"}, ConfigError, "'soon'"),
        ({"base_model": "MODEL", "name": "a/b"}, ConfigError, "'a/b'"),
        ({"base_model": Path("/no/such-model")}, UnknownBaseModelError, "unknown base model '/no/such-model'"),
        ({"base_model": [Path("/no/such-model")]}, UnknownBaseModelError, "unknown base model '/no/such-model'"),
        ({"base_model": 3}, ConfigError, "base_model is 3; expected a hub name, the folder"),
        ({"base_model": ["MODEL", None]}, ConfigError, "base_model is .*None.; expected a hub name, the folder"),
        ({"base_model": "MODEL", "cluster": ClusterProfile("local")}, ConfigError, "expected a profile's name: local"),
        ({"base_model": "MODEL", "memory": 64}, ConfigError, 'memory is 64; write .*"64G"'),
        ({"base_model": "MODEL", "name": 3}, ConfigError, "name is 3; .* a string"),
        ({"base_model": "MODEL", "environment": {"A": 1}}, ConfigError, 'environment A is 1; write .*"1"'),
        ({"base_model": "MODEL", "environment": {"A B": "x"}}, ConfigError, "environment has a variable 'A B'; a name"),
        ({"base_model": "MODEL", "environment": ["A=x"]}, ConfigError, "environment is ..A=x..; expected variables"),
    ],
)
def test_a_mistake_leaves_no_run_behind(data_root: Path, *, kwargs, error, words, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = data_root.parent / "model"
    model.mkdir()
    shutil.copy(MODEL / "config.json", model)
    (model / "model.safetensors").touch()
    kwargs["base_model"] = str(model) if kwargs["base_model"] == "MODEL" else kwargs["base_model"]
    with pytest.raises(error, match=words):
        submit(train, 1, **{"cluster": "local", **kwargs})
    assert not (data_root / "runs").exists() or not list((data_root / "runs").iterdir())


def test_the_folder_of_a_model_may_be_a_path(data_root: Path) -> None:
    with pytest.raises(ConfigError, match="nodes is 2"):  # which is looked at when the model has been read
        submit(train, 1, base_model=MODEL, cluster="local", nodes=2)


@pytest.mark.parametrize("ended", [KeyboardInterrupt, RuntimeError])
def test_no_run_is_left_behind_by_what_nobody_foresaw(data_root: Path, monkeypatch, ended) -> None:
    def end(*args: object, **kwargs: object) -> None:
        raise ended

    with monkeypatch.context() as patched, pytest.raises(ended):
        patched.setattr("tinker_hpc.submission.resolve", end)
        submit(train, 1, base_model=str(MODEL), cluster="local")
    assert not list((data_root / "runs").iterdir())
    monkeypatch.setattr("launch.submit.submit", end)
    with pytest.raises(ended):
        submit(train, 1, base_model=str(MODEL), cluster="local")
    assert len(list((data_root / "runs").iterdir())) == 1, "there may be a job that needs it"


def test_what_does_not_pickle_fails_first(data_root: Path) -> None:
    with pytest.raises(SerializationError, match="argument 0 is a generator"):
        submit(train, (i for i in range(3)), base_model="no/such-model", cluster="local")


def make_run(root: Path, *, command: tuple[str, ...] | None = None, kind: str = "run", **files: object) -> Run:
    """A run whose (local) job is gone: process id 1 with another start is nobody."""
    folder = RunFolder.new(root, "r")
    spec = JobSpec(folder.run_id, kind, "r", "m", "/m", ClusterProfile("local", executor="local"), command=command)  # type: ignore[arg-type]
    write_json(folder.spec, {**spec.to_json(), "created_at": 1.0})
    import socket

    submitted = {
        "job_id": "1",
        "cluster": "local",
        "submitted_at": 1.0,
        "run_id": folder.run_id,
        "executor": "local",
        "run_folder": str(folder.path),
        "host": socket.gethostname(),
        "process_start": -1,
    }
    write_json(folder.submitted, submitted)
    for name, value in files.items():
        if isinstance(value, bytes):
            write_bytes(getattr(folder, name), value)
        else:
            write_json(getattr(folder, name), value)
    config = build_config({"data_root": str(root)}, environ={"PATH": ""})
    return Run(folder.run_id, config=config)


def outcome(reason: str, exit_code: int, error: str = "why") -> dict:
    state = "succeeded" if exit_code == 0 else "failed"
    return {"state": state, "reason": reason, "exit_code": exit_code, "error": error, "ended_at": 3.0}


def test_the_value_comes_back_by_result_and_by_await(data_root: Path) -> None:
    run = make_run(data_root, result=dump_success([1.0, 0.5]))
    assert run.result(timeout=60) == [1.0, 0.5]
    assert run.done() and run.exception() is None

    async def wait() -> object:
        return await run

    assert asyncio.run(wait()) == [1.0, 0.5]
    assert repr(Run(run.id, config=run._config)) == f"Run({run.id!r})"


def test_the_loops_exception_comes_back_with_its_traceback(data_root: Path) -> None:
    try:
        {}["reward"]
    except KeyError as error:
        data = dump_error(error)
    run = make_run(data_root, result=data)
    (run.folder.logs / "loop.log").write_text("step 1\n")
    with pytest.raises(LoopFailedError) as caught:
        run.result(timeout=60)
    error = caught.value
    assert isinstance(error.__cause__, KeyError)
    assert "raised KeyError: 'reward'" in str(error)
    assert 'test_runs.py", line' in error.remote_traceback and error.remote_traceback in str(error) + "\n"
    assert error.log_paths[0].endswith("loop.log") and error.log_paths[0] in str(error)


def test_a_commands_exit_code_and_last_words(data_root: Path) -> None:
    run = make_run(data_root, command=("python", "x.py"), outcome=outcome("loop", 3))
    (run.folder.logs / "loop.log").write_text("a\n" * 30 + "the last words\n")
    with pytest.raises(LoopFailedError, match=r"exit code 3: python x\.py(.|\n)*the last words") as caught:
        run.result(timeout=60)
    assert caught.value.exit_code == 3
    assert make_run(data_root, command=("true",), outcome=outcome("loop", 0)).result(timeout=60) is None


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ({"outcome": outcome("time_limit", 143)}, JobTimeLimitError, "`time`"),
        ({"outcome": outcome("cancelled", 143)}, JobCancelledError, "CANCELLED"),
        ({"cancel": {}}, JobCancelledError, "CANCELLED"),
        ({"outcome": outcome("worker", 1, "rank 0: no such file")}, JobFailedError, "rank 0: no such file"),
        ({"outcome": outcome("setup", 127, "cannot start 'pyhton'")}, JobFailedError, "cannot start 'pyhton'"),
        ({"outcome": outcome("loop", 139)}, JobFailedError, "139"),
        ({}, JobFailedError, "left no outcome"),
    ],
)
def test_a_job_that_ended_otherwise_says_why(data_root: Path, files, error, words) -> None:
    run = make_run(data_root, **files)
    with pytest.raises(error) as caught:
        run.result(timeout=60)
    assert words in str(caught.value) and run.id in str(caught.value)
    assert type(run.exception(timeout=60)) is error


def test_a_timeout_leaves_the_run_alone(data_root: Path) -> None:
    import os

    from launch import process_tree

    me = process_tree.identity(os.getpid())
    assert me is not None
    run = make_run(data_root)
    submitted = json.loads(run.folder.submitted.read_text())
    write_json(run.folder.submitted, {**submitted, "job_id": str(me.pid), "process_start": me.start})
    with pytest.raises(TimeoutError, match="it goes on"):
        run.result(timeout=0.3)
    assert not run.done()


def test_an_unknown_id(data_root: Path) -> None:
    with pytest.raises(UnknownRunError, match="tinker-hpc ls"):
        Run("nope")
    with pytest.raises(UnknownRunError):
        Run("../../etc")


def test_logs(data_root: Path) -> None:
    run = make_run(data_root)
    assert run.logs() == "" and run.logs("worker-0") == ""
    (run.folder.logs / "loop.log").write_text("one\ntwo\nthree\n")
    (run.folder.logs / "gateway.log").write_text("")
    assert run.logs(tail=2) == "two\nthree\n"
    assert list(run.log_paths) == ["loop", "gateway"]
    with pytest.raises(ConfigError, match="no log 'lop'; there are loop, gateway"):
        run.logs("lop")
