"""The stock `tinker` command against a gateway: every command of it, and what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import serving
import tinker
from click.testing import CliRunner
from tinker.cli.__main__ import main_cli
from tinker.cli.exceptions import TinkerCliError

pytestmark = pytest.mark.slow

WAIT_S = 60


@pytest.fixture(scope="module")
def trainer(service, service_client) -> tinker.TrainingClient:
    return service_client.create_lora_training_client(base_model=service.base_model, rank=4, seed=1).result(WAIT_S)


@pytest.fixture
def state(trainer, request) -> str:
    return trainer.save_state(request.node.name.replace("[", "-").replace("]", "")).result(WAIT_S).path


@dataclass
class Ran:
    stdout: str
    stderr: str


class Cli:
    """Runs it in this process, with a home of its own: each start of the command would import the SDK anew."""

    def __init__(self, service: serving.Service, home: Path) -> None:
        self.env = {"TINKER_BASE_URL": service.base_url, "TINKER_API_KEY": service.api_key}
        self.env.update(HOME=str(home), NO_COLOR="1", COLUMNS="300")
        self.home = home

    def run(self, *args: str, code: int = 0, env: dict[str, str] | None = None, **more: Any) -> Ran:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = CliRunner().invoke(main_cli, list(args), env={**self.env, **(env or {})}, **more)
        stderr, exit_code = result.stderr, result.exit_code
        if isinstance(result.exception, TinkerCliError):  # what the command's own main() prints
            stderr += f"Error: {result.exception.message}\n{result.exception.details}"
        assert exit_code == code, (args, result.stdout, stderr, result.exception)
        return Ran(result.stdout, stderr)

    def json(self, *args: str) -> Any:
        return json.loads(self.run("--format", "json", *args).stdout)


@pytest.fixture
def cli(service, tmp_path, monkeypatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli(service, tmp_path)


def test_the_command_itself(cli):
    command = [sys.executable, "-W", "ignore", "-m", "tinker.cli", "run", "info", "s-no:train:0"]
    ran = subprocess.run(
        command, env={**os.environ, **cli.env}, capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert ran.returncode == 1 and "unknown training run 's-no:train:0'" in ran.stderr


def test_version_and_models(cli, trainer):
    assert tinker.__version__ in cli.run("version").stdout
    assert trainer.get_info().model_name in cli.run("model", "list").stdout


def test_auth(cli, service):
    assert "Tinker accessible: yes" in cli.run("auth", "status").stdout
    assert cli.json("auth", "whoami")["user_urn"].startswith("urn:tinker_hpc:user:")
    wrong = cli.run("auth", "status", code=1, env={"TINKER_API_KEY": "tml-of-another-run"})
    assert "wrong or missing API key" in wrong.stdout + wrong.stderr
    login = cli.run("auth", "login", input=f"{service.api_key}\n")
    assert "Stored API key 'tinker_hpc run'" in login.stdout
    assert "Tinker accessible: yes" in cli.run("auth", "status", env={"TINKER_API_KEY": ""}).stdout
    assert "Removed credential 'tinker_hpc run'" in cli.run("auth", "logout").stdout


def test_runs(cli, trainer, state):
    runs = cli.json("run", "list")["runs"]
    assert trainer.model_id in {run["training_run_id"] for run in runs}
    about = cli.json("run", "info", trainer.model_id)
    assert about["lora_rank"] == 4 and about["last_checkpoint"]["tinker_path"] == state
    assert trainer.model_id in cli.run("run", "list").stdout
    missing = cli.run("run", "info", "s-no:train:0", code=1)
    assert "unknown training run 's-no:train:0'" in missing.stderr


def test_checkpoints_are_listed_and_described(cli, trainer, state):
    for args in (("--run-id", trainer.model_id), ("--limit", "0"), ()):
        assert state in {each["tinker_path"] for each in cli.json("checkpoint", "list", *args)["checkpoints"]}
    about = cli.json("checkpoint", "info", state)
    assert (about["checkpoint_type"], about["lora_rank"], about["public"]) == ("training", 4, False)
    assert "Never" in cli.run("checkpoint", "info", state).stdout


def test_a_checkpoint_is_published_and_given_a_time(cli, state):
    cli.run("checkpoint", "publish", state)
    assert cli.json("checkpoint", "info", state)["public"]
    cli.run("checkpoint", "unpublish", state)
    assert not cli.json("checkpoint", "info", state)["public"]
    cli.run("checkpoint", "set-ttl", state, "--ttl", "7200")
    assert cli.json("checkpoint", "info", state)["expires_at"]
    cli.run("checkpoint", "set-ttl", state, "--remove")
    assert cli.json("checkpoint", "info", state)["expires_at"] is None
    short = cli.run("checkpoint", "set-ttl", state, "--ttl", "60", code=1)
    assert "expected 3600 (one hour)" in short.stderr


def test_checkpoints_are_deleted(cli, trainer, state):
    assert cli.json("checkpoint", "delete", "--yes", state) == {"deleted_count": 1, "failed": []}
    again = cli.json("checkpoint", "delete", "--yes", state)
    assert again["deleted_count"] == 0 and "no checkpoint" in again["failed"][0]["error"]
    sampler = trainer.save_weights_for_sampler("to-delete").result(WAIT_S).path
    cli.run("checkpoint", "delete", "--yes", "--run-id", trainer.model_id, "--type", "sampler_weights")
    left = cli.json("checkpoint", "list", "--run-id", trainer.model_id)["checkpoints"]
    assert sampler not in {each["tinker_path"] for each in left}


def test_states_and_external_weights_are_downloaded(cli, trainer, state):
    external = trainer.save_weights_external("out").result(WAIT_S).path
    for path in (state, external):
        cli.run("checkpoint", "download", path, "--output", "there")
        folder = cli.home / "there" / path.removeprefix("tinker://").replace("/", "_")
        assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    left = cli.json("checkpoint", "list")["checkpoints"]
    assert {each["tinker_path"] for each in left if each["checkpoint_type"] == "external"} == {external}
    sampler = trainer.save_weights_for_sampler("no-download").result(WAIT_S).path
    refused = cli.run("checkpoint", "download", sampler, code=1)
    assert "Sampler checkpoints cannot be downloaded" in refused.stderr


def test_a_sessions_trace_is_exported(cli, trainer):
    session = trainer.model_id.partition(":")[0]
    cli.run("session", "export-trace", session, "--output", "trace.pftrace")
    events = json.loads((cli.home / "trace.pftrace").read_text())["traceEvents"]
    assert {"create_model", "save_state"} <= {event["name"] for event in events}
    assert cli.run("session", "export-trace", session, "--url-only").stdout.startswith("file:///")
    missing = cli.run("session", "export-trace", "s-no", code=1)
    assert "unknown session 's-no'" in missing.stderr


def test_what_a_cluster_has_not_is_refused_in_words(cli, state):
    for args in (("usage", "2026-01-01", "2026-01-02"), ("checkpoint-storage",)):
        assert "billed here" in cli.run("billing", *args, code=1).stderr
    pushed = cli.run("checkpoint", "push-hf", state, code=1, env={"HF_HUB_OFFLINE": "1"})
    assert "Not logged in" in pushed.stderr, "the SDK asks the hub first; nothing of it is ours"
