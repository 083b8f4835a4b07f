"""The command line over real run folders: what people and programs read, and the exit codes."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import click
import pytest
from published_configs import PUBLISHED

from launch import attempts, lineage, process_tree
from launch.job_spec import JobSpec
from launch.submitted import SubmittedJob
from tinker_hpc.cli.follow import Tail
from tinker_hpc.cli.main import COMMANDS, main
from tinker_hpc.cli.output import age_text, size_text
from tinker_hpc.config import ClusterProfile
from tinker_hpc.private_files import write_json
from tinker_hpc.resume import put_end_aside
from tinker_hpc.run_folder import RunFolder, checkpoint_folder

TINY = Path(__file__).parents[2] / "models" / "tiny-qwen3"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINKER_HPC_DATA_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("TINKER_HPC_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("TINKER_HPC_CONFIG", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "root"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]):
    def run(*argv: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(argv))
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def make_run(root: Path, name: str, outcome: dict | None) -> RunFolder:
    folder = RunFolder.new(root, name)
    spec = JobSpec(folder.run_id, "run", name, "org/m", "/m", ClusterProfile("local", executor="local"), command=("x",))
    write_json(folder.spec, {**spec.to_json(), "created_at": time.time()})
    job = {"job_id": "1", "cluster": "local", "submitted_at": 1.0, "run_id": folder.run_id, "executor": "local"}
    where = {"run_folder": str(folder.path), "host": socket.gethostname(), "process_start": -1}
    write_json(folder.submitted, {**job, **where})
    if outcome:
        write_json(folder.outcome, {"ended_at": 3.0, "error": None, **outcome})
    return folder


GOOD = {"state": "succeeded", "reason": "loop", "exit_code": 0}
BAD = {"state": "failed", "reason": "loop", "exit_code": 3, "error": "Traceback:\nKeyError: 'x'"}


def test_ls(root: Path, call) -> None:
    code, out, err = call("ls", "--json")
    assert (code, out) == (0, "[]\n") and f"there is no folder {root} yet; the first run makes it" in err
    make_run(root, "good", GOOD)
    make_run(root, "bad", BAD)
    code, out, _ = call("ls", "--json")
    states = {run["name"]: (run["state"], run["exit_code"], run["reason"]) for run in json.loads(out)}
    assert code == 0
    assert states == {"good": ("COMPLETED", 0, ""), "bad": ("FAILED", 3, "Traceback:\nKeyError: 'x'")}
    _, out, _ = call("ls")
    assert len(out.splitlines()) == 3 and "Traceback: KeyError: 'x'" in out
    code, out, err = call("ls", "-n", "1")
    assert len(out.splitlines()) == 2 and err == ""


@pytest.mark.parametrize("command", ["ls", "usage"])
def test_a_data_root_that_is_a_file(root: Path, call, command: str) -> None:
    root.write_text("")
    code, out, err = call(command)
    assert (code, out) == (2, "") and f"cannot list {root}/runs: Not a directory" in err


@pytest.mark.parametrize("name", ["submitted.json", "jobs/2.json", "workers/0/status.json"])
def test_a_damaged_run_is_named_by_ls_and_said_by_status(root: Path, call, name: str) -> None:
    good, bad = make_run(root, "good", GOOD), make_run(root, "bad", BAD)
    (bad.path / name).parent.mkdir(parents=True, exist_ok=True)
    (bad.path / name).write_text("{")
    code, out, err = call("ls", "--json")
    assert code == 0 and [run["id"] for run in json.loads(out)] == [good.run_id]
    if name != "submitted.json":  # without that it is not listed at all
        assert err.count(f"cannot read {bad.path / name} of run {bad.run_id}: ") == 1
    for command in ("status", "cancel", "resume"):
        code, out, err = call(command, bad.run_id)
        assert (code, out) == (2, "")
        assert f"cannot read {bad.path / name} of run {bad.run_id}: " in err and "bring it back from a backup" in err
    assert call("logs", bad.run_id)[0] == 0


def test_a_run_without_its_workers_folder(root: Path, call) -> None:
    folder = make_run(root, "bad", BAD)
    (folder.path / "workers").rmdir()
    for command in ("status", "metrics", "resume"):
        code, out, err = call(command, folder.run_id)
        assert (code, out) == (2, "") and f"cannot read {folder.path}/workers of run" in err


def test_ls_says_the_same_from_its_memory(root: Path, call, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(root, "bad", BAD)
    monkeypatch.setattr("tinker_hpc.cli.states._ACCOUNTING_LAG_S", -1.0)
    first = call("ls", "--json")[1]
    assert call("ls", "--json")[1] == first
    assert json.loads(first)[0]["exit_code"] == 3


def test_ls_sees_that_a_run_was_resumed(root: Path, call, monkeypatch: pytest.MonkeyPatch) -> None:
    """On whatever machine: this one's memory of it is of its end, and nobody has told it."""
    monkeypatch.setattr("tinker_hpc.cli.states._ACCOUNTING_LAG_S", -1.0)
    folder = make_run(root, "stopped", {"state": "failed", "reason": "cancelled", "exit_code": 143})

    def states() -> list[tuple[str, list[str]]]:
        return [(run["state"], run["job_ids"]) for run in json.loads(call("ls", "--json")[1])]

    assert states() == states() == [("CANCELLED", ["1"])]
    put_end_aside(folder)  # as resume() does
    attempts.start_afresh(folder)
    me = process_tree.identity(os.getpid())
    first = SubmittedJob.of(folder)
    assert me is not None and first is not None
    lineage.remember(folder, replace(first, job_id=str(me.pid), process_start=me.start))
    assert states() == states() == [("RUNNING", ["1", str(me.pid)])]
    write_json(folder.outcome, {"ended_at": 9.0, "error": None, **GOOD})
    assert states() == [("COMPLETED", ["1", str(me.pid)])]


def test_status_and_logs(root: Path, call) -> None:
    folder = make_run(root, "good", GOOD)
    (folder.logs / "loop.log").write_text("one\ntwo\n")
    (folder.worker(0).path).mkdir(parents=True)
    write_json(folder.worker(0).declaration, {})
    folder.worker(0).metrics.write_text(json.dumps({"step": 1, "loss_per_token": 0.5, "model_id": "s:train:0"}) + "\n")
    code, out, _ = call("status", folder.run_id, "--json")
    status = json.loads(out)
    assert (code, status["state"], status["last_metrics"]["step"]) == (0, "COMPLETED", 1)
    assert "COMPLETED" in call("status", folder.run_id)[1]
    assert call("logs", folder.run_id) == (0, "one\ntwo\n", "")
    assert call("logs", "--tail", "1", folder.run_id)[1] == "two\n"
    assert json.loads(call("logs", "--json", folder.run_id)[1])["text"] == "one\ntwo\n"
    assert call("logs", "--which", "gateway", folder.run_id) == (
        0, "", "(nothing in log 'gateway'; other logs, for --which: loop)\n"
    )  # fmt: skip
    code, out, err = call("logs", "-f", folder.run_id)
    assert (code, out) == (0, "one\ntwo\n") and "COMPLETED" in err
    assert call("logs", "-f", "--tail", "1", folder.run_id)[1] == "two\n"
    assert call("logs", "--tail", "0", folder.run_id)[1] == call("logs", "-f", "--tail", "0", folder.run_id)[1] == ""
    with (folder.logs / "loop.log").open("a") as log:
        log.write("no newline")
    *lines, last = call("logs", "-f", "--json", folder.run_id)[1].splitlines()
    assert [json.loads(line)["line"] for line in lines] == ["one", "two", "no newline"]
    assert json.loads(last)["state"] == "COMPLETED"
    for argv in (("logs",), ("logs", "-f")):
        code, out, err = call(*argv, "--which", "nonsense", folder.run_id)
        assert (code, out) == (2, "") and "has no log 'nonsense'; there are loop" in err
    assert json.loads(call("metrics", folder.run_id, "--json")[1])[0]["loss_per_token"] == 0.5
    assert "LOSS_PER_TOKEN" in call("metrics", folder.run_id)[1]


def test_plot(root: Path, call, tmp_path: Path) -> None:
    folder = make_run(root, "good", GOOD)
    code, _, err = call("plot", folder.run_id)
    assert code == 2 and "no metrics yet" in err
    folder.worker(0).path.mkdir(parents=True)
    write_json(folder.worker(0).declaration, {})
    rows = [{"step": i, "loss_per_token": 1.0 / i, "grad_norm": None, "model_id": "s:train:0"} for i in range(1, 9)]
    folder.worker(0).metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = call("plot", folder.run_id, "--json")
    path = Path(json.loads(out)["path"])
    assert code == 0 and path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    code, _, err = call("plot", folder.run_id, "--key", "los")
    assert code == 2 and "no metric 'los'; there are loss_per_token" in err


def test_cancel_of_what_is_over(root: Path, call) -> None:
    folder = make_run(root, "good", GOOD)
    code, out, _ = call("cancel", folder.run_id, "--json")
    assert (code, json.loads(out)) == (0, {"id": folder.run_id, "cancelled": False, "state": "COMPLETED"})
    assert call("cancel", folder.run_id, "nope")[0] == 2


def test_checkpoints_and_export(root: Path, call, tmp_path: Path) -> None:
    folder = make_run(root, "good", GOOD)
    assert json.loads(call("checkpoints", folder.run_id, "--json")[1]) == []
    code, _, err = call("export", folder.run_id)
    assert code == 2 and "has saved no checkpoint" in err
    write_json(folder.path / "sessions.json", {"s-1": {}})
    saved = checkpoint_folder(root, "s-1:train:0", "sampler_weights", "final")
    saved.mkdir(parents=True)
    (saved / "adapter_config.json").write_text("{}")
    (saved / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")  # safetensors without tensors
    write_json(saved / "checkpoint.json", {"base_model": "org/m", "created_at": 5.0, "model_id": "s-1:train:0"})
    path = "tinker://s-1:train:0/sampler_weights/final"
    assert [c["path"] for c in json.loads(call("checkpoints", "--json")[1])] == [path]
    assert path in call("checkpoints", folder.run_id)[1]
    code, out, _ = call("export", path, "--to", str(tmp_path / "adapter"), "--json")
    assert code == 0 and (Path(json.loads(out)["folder"]) / "adapter_config.json").exists()
    assert call("export", folder.run_id)[1].strip() == str(tmp_path / "final")


def test_usage(root: Path, call) -> None:
    make_run(root, "good", GOOD)
    assert json.loads(call("usage", "--json")[1]) == {"local": {"num_runs": 1, "gpu_hours": 0.0, "num_unknown": 0}}


def test_dry_run_writes_nothing(root: Path, call, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    facts = {"vocab_size": 8, "max_position_embeddings": 8, "hidden_size": 8, "num_key_value_heads": 2}
    facts |= {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "model_type": "llama"}
    (model / "config.json").write_text(json.dumps(facts))
    argv = ("run", "--base-model", str(model), "--cluster", "slurm", "--gpus-per-node", "4", "--time", "8:00:00")
    code, out, err = call(*argv, "--dry-run", "--", "python", "x.py", "--json")
    assert code == 0 and out.startswith("#!/bin/bash") and "#SBATCH --time=08:00:00" in out and err == ""
    code, out, _ = call(*argv, "--dry-run", "--json", "--", "python", "x.py")
    assert json.loads(out)["spec"]["command"] == ["python", "x.py"]
    assert not root.exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("status", "nope"), "no run 'nope' under"),
        (("run", "--base-model", "org/none", "--", "true"), "unknown base model 'org/none'"),
        (("run", "--cluster", "local", "--", "true"), "Missing option '--base-model'"),
        (("run", "--base-model", "m"), "Missing argument"),
        (("run", "--base-model", "m", "--nodes", "x", "--", "true"), "'x' is not a valid integer"),
        (("run", "--base-model", "m", "--nodes", "0", "--", "true"), "nodes is 0"),
        (("ls", "-n", "-3"), "-3 is not in the range x>=0"),
        (("metrics", "--tail", "-3", "ID"), "-3 is not in the range x>=0"),
        (("frobnicate",), "No such command 'frobnicate'"),
        (("statu",), "No such command 'statu'. Did you mean 'status'?"),
        (("run", "--base-model", "m", "--", "python3", "-u", "nope.py", "--steps", "3"), "no file nope.py in "),
        (("export", "tinker://x/y"), "is not a checkpoint path"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(root: Path, call, argv, words) -> None:
    code, out, err = call(*argv)
    assert (code, out) == (2, "")
    assert words in err and "Traceback" not in err
    code, out, _ = call(argv[0], "--json", *argv[1:])
    if argv[0] in COMMANDS:
        assert code == 2 and words in json.loads(out)["error"]


def test_alone_it_shows_its_help(call) -> None:
    assert call() == call("--help")


def test_debug_shows_the_traceback(root: Path) -> None:
    from tinker_hpc.errors import UnknownRunError

    with pytest.raises(UnknownRunError):
        main(["--debug", "status", "nope"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented_and_takes_json(name: str) -> None:
    module, line = COMMANDS[name]
    command: click.Command = getattr(import_module(f"tinker_hpc.cli.{module}"), name)
    assert command.name == name
    assert (command.help or "").splitlines()[0] == line
    assert any("--json" in option.opts for option in command.params)
    for option in command.params:
        assert isinstance(option, click.Argument) or option.help, f"{name} {option.name} has no help"


def test_tail_reads_what_was_added(tmp_path: Path) -> None:
    file = tmp_path / "loop.log"
    tail = Tail(file)
    assert tail.read() == b""
    file.write_bytes(b"one\n")
    assert tail.read() == b"one\n"
    assert tail.read() == b""
    with file.open("ab") as stream:
        stream.write(b"tw")
    assert tail.read() == b"tw"
    assert [Tail(file, last=number).read() for number in (0, 1, 2, 3)] == [b"", b"tw", b"one\ntw", b"one\ntw"]
    rest = Tail(file, last=0)
    with file.open("ab") as stream:
        stream.write(b"o\n")
    assert rest.read() == b"o\n"
    assert Tail(tmp_path / "none", last=2).read() == b""


@pytest.mark.parametrize(("seconds", "text"), [(5, "5s"), (65, "1m"), (7200, "2h"), (200_000, "2d")])
def test_ages(seconds, text) -> None:
    assert age_text(1000.0, now=1000.0 + seconds) == text


def test_sizes() -> None:
    assert [size_text(n) for n in (812, 3_565_158, 5 * 2**40)] == ["812 B", "3.4 MiB", "5120.0 GiB"]


def test_plan(root: Path, call, tmp_path: Path) -> None:
    widths = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(widths | config))
    code, out, _ = call("plan", "--base-model", "llama", "--gpus", "4", "--gpu-memory", "80", "--json")
    made = json.loads(out)
    assert code == 0 and made["fits"] and (made["tp_size"], made["dp_size"], made["dtype"]) == (4, 1, "bfloat16")
    assert made["memory"]["weights"] == 35_278_831_616  # what the built model holds: tests/distributed/meta_model.py
    code, out, _ = call("plan", "--base-model", "llama", "--gpus", "4", "--gpu-memory", "40")
    assert code == 0 and "fits    no\n" in out and "or on 2 such nodes" in out and "longest sequence" not in out
    assert "of 40 GiB, 10% of which stay free" in out
    held = {
        row[0]: float(row[1]) for row in (line.split() for line in out.partition("HOLDS")[2].splitlines()[1:8] if line)
    }
    assert held.pop("total") == pytest.approx(sum(held.values()), abs=0.02) and held["snapshots"] > 0
    code, out, _ = call("plan", "--base-model", "llama", "--cluster", "slurm", "--gpus", "8")
    assert code == 0 and "is not known: 40 GiB are assumed. Give --gpu-memory" in out
    code, out, _ = call("plan", "--base-model", "llama", "--gpus", "0", "--memory", "400")
    assert code == 0 and "memory is '400', which is 400 MiB (Slurm's unit): write 400G for GiB." in out
    assert "GPU" not in out and "GiB of memory on a node (--memory " in out
    assert "Slurm's unit" not in call("plan", "--base-model", "llama", "--gpus", "0", "--memory", "200G")[1]
    code, _, err = call("plan", "--base-model", "llama", "--gpus", "0", "--memory", "64X")
    assert code == 2 and "memory is '64X'; write a number and K, M, G or T" in err
    code, _, err = call("plan", "--base-model", "llama", "--gpus", "4", "--gpu-memory", "80", "--tp-size", "3")
    assert code == 2 and "tp_size is 3: it must divide the 4 ranks of a node" in err
    (tmp_path / "llama" / "config.json").write_text(json.dumps(widths | config | {"model_type": "mistral"}))
    code, out, err = call("plan", "--base-model", "llama", "--gpus", "4", "--gpu-memory", "80")
    assert code == 2 and out == "" and "says model_type 'mistral', which is not supported" in err


def test_plan_takes_the_options_it_names(root: Path, call, tmp_path: Path) -> None:
    """Three stages are advised for twelve small GPUs, by options that give them; all sizes are named as `run` does."""
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "config.json").write_text(json.dumps(PUBLISHED["Qwen3-30B-A3B"]))
    asked = ("plan", "--base-model", "moe", "--gpus-per-node", "12", "--gpu-memory", "24", "--json")
    made = json.loads(call(*asked)[1])
    advised = re.search(r"\((--tp-size .*?)\) would leave room for (\d+)", " ".join(made["reasons"]))
    assert advised and (made["tp_size"], made["pp_size"]) == (4, 1)
    made = json.loads(call(*asked, *advised[1].split())[1])
    assert (made["tp_size"], made["ep_size"], made["pp_size"]) == (2, 4, 3)
    assert made["longest_sequence"] == int(advised[2])
    code, out, _ = call(
        "plan", "--base-model", "moe", "--gpus", "0", "--ranks-per-node", "2", "--memory", "512G", "--json"
    )
    assert code == 0 and json.loads(out)["capacity"] == 256 * 2**30


def test_plan_without_known_memory(root: Path, call) -> None:
    code, out, _ = call("plan", "--base-model", str(TINY), "--cluster", "local")
    assert code == 0 and "fits         not known\n" in out and "Give --memory" in out
    assert not any(word in out for word in ("total", "KV cache", "snapshots", "longest sequence", "inf"))
    code, out, _ = call("plan", "--base-model", str(TINY), "--cluster", "local", "--memory", "8G")
    assert code == 0 and "of 8 GiB, 10% of which stay free" in out and "Give --memory" not in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--cluster", "local", "--gpu-memory", "80"), "--gpu-memory is 80, but the plan is for nodes without GPUs"),
        (("--gpus", "4", "--memory", "64G"), "--memory is '64G', but the plan is for 4 GPU(s) on a node"),
        (("--gpus", "4", "--gpu-memory", "nan"), "--gpu-memory is nan; it must be a number of GiB of at least 1"),
        (("--gpus", "4", "--gpu-memory", "inf"), "--gpu-memory is inf; it must be"),
        (("--gpus", "4", "--gpu-memory", "0"), "--gpu-memory is 0; it must be"),
    ],
)
def test_plan_refuses_memory_that_would_play_no_part(root: Path, call, options: tuple[str, ...], words: str) -> None:
    code, out, err = call("plan", "--base-model", str(TINY), *options)
    assert code == 2 and out == "" and words in err


def test_plan_on_slices_of_a_gpu(root: Path, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.toml").write_text('[clusters.mig]\ngpu_type = "a100_1g.5gb"\n')
    monkeypatch.setenv("TINKER_HPC_CONFIG", str(tmp_path / "config.toml"))
    code, out, _ = call("plan", "--base-model", str(TINY), "--cluster", "mig", "--json")
    assert code == 0 and json.loads(out)["capacity"] == 5 * 2**30
    code, _, err = call("plan", "--base-model", str(TINY), "--cluster", "mig", "--gpus", "2")
    assert code == 2 and "gpu_type is a slice of a GPU (MIG)" in err
    assert call("plan", "--base-model", str(TINY), "--cluster", "mig", "--gpus", "2", "--gpu-memory", "80")[0] == 0
