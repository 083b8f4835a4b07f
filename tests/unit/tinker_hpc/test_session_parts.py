"""The parts of a session: what the gateway is told about its worker, what is left of one that got no job, the proxy."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import sbatch
from launch.job_state import JobState, JobStatus
from tinker_hpc import service
from tinker_hpc.config import build_config
from tinker_hpc.errors import ConfigError, SlurmUnavailableError, SubmissionError
from tinker_hpc.private_files import read_json
from tinker_hpc.service import bypass_proxy
from tinker_hpc.sessions import Session
from tinker_hpc.worker_watch import phase_of


@pytest.mark.parametrize(
    ("job", "ready", "phase", "words"),
    [
        (JobStatus("8", JobState.PENDING, "PENDING", "Priority"), False, "queued", "Slurm PENDING (Priority), job 8"),
        (JobStatus("8", JobState.PENDING, "PENDING"), False, "queued", "Slurm PENDING, job 8"),
        (JobStatus("8", JobState.RUNNING, "RUNNING", nodes=("n1",)), False, "starting", "job 8 runs on n1"),
        (JobStatus("8", JobState.RUNNING, "RUNNING"), True, "ready", ""),
        (JobStatus("8", JobState.UNKNOWN, reason="squeue: timed out"), True, "ready", ""),
        (JobStatus("8", JobState.UNKNOWN, reason="no answer"), False, "queued", "UNKNOWN (no answer)"),
        (JobStatus("8", JobState.COMPLETED, "COMPLETED"), True, "ended", "closed"),
        (JobStatus("8", JobState.TIMEOUT, "TIMEOUT", "TimeLimit"), True, "ended", "TimeLimit"),
    ],
)
def test_phases(job, ready, phase, words) -> None:
    found, reason, error = phase_of(job, ready=ready)
    assert found == phase
    assert words in reason
    # The gateway answers open futures with the error; a closed worker is not one.
    assert (error is not None) is (job.state.finished and not job.state.ok)
    assert error is None or (job.state.value in error and "8" in error)


def test_estimated_start_is_told() -> None:
    job = JobStatus("8", JobState.PENDING, "PENDING", "Resources", estimated_start=1_700_000_000.0)
    assert "estimated start" in phase_of(job, ready=False)[1]


def test_a_reason_is_told_in_words() -> None:
    held = JobStatus("8", JobState.PENDING, "PENDING", "JobHeldUser")
    assert phase_of(held, ready=False)[1].endswith("job 8: held; `scontrol release 8` lets it go")
    limited = JobStatus("8", JobState.PENDING, "PENDING", "QOSMaxJobsPerUserLimit")
    assert "a limit of your QOS is reached" in phase_of(limited, ready=False)[1]
    down = JobStatus("8", JobState.PENDING, "PENDING", "ReqNodeNotAvail, UnavailableNodes:n[1-4]")
    assert phase_of(down, ready=False)[1].endswith("nodes it needs are down, drained or reserved")


@pytest.mark.parametrize(
    "reason",
    [
        "QOSMaxWallDurationPerJobLimit",
        "AssocMaxWallDurationPerJobLimit",
        "QOSMaxGRESPerJob",
        "QOSMaxNodePerJobLimit",
        "AssocMaxCpuPerJobLimit",
        "QOSMaxMemoryPerNode",
        "QOSMaxCpuMinutesPerJobLimit",
        "QOSMinGRES",
        "QOSMinCpuNotSatisfied",
    ],
)
def test_a_limit_of_the_job_itself_does_not_pass(reason: str) -> None:
    said = phase_of(JobStatus("8", JobState.PENDING, "PENDING", reason), ready=False)[1]
    assert "it will not start as it is" in said and ("QOS" if reason.startswith("QOS") else "account") in said
    assert ("ask for more" if reason.startswith("QOSMin") else "ask for less") in said


@pytest.mark.parametrize("reason", ["AssocMaxJobsLimit", "QOSGrpGRES", "QOSMaxNodePerUserLimit", "AssocGrpCpuLimit"])
def test_a_limit_of_all_jobs_passes(reason: str) -> None:
    said = phase_of(JobStatus("8", JobState.PENDING, "PENDING", reason), ready=False)[1]
    assert said.endswith("it starts when other jobs of it end")


def test_a_successor_says_what_became_of_the_job_before_it() -> None:
    job = JobStatus("9", JobState.PENDING, "PENDING", "Priority")
    assert phase_of(job, ready=False, before="it was preempted")[1].endswith(
        "jobs of higher priority go first; it was preempted, and the run goes on in this one"
    )


def test_what_slurm_said_last_is_kept_while_it_is_away() -> None:
    away = JobStatus("8", JobState.UNKNOWN, reason="squeue failed: Connection refused.")
    last = phase_of(JobStatus("8", JobState.PENDING, "PENDING", "Priority"), ready=False)[:2]
    phase, reason, error = phase_of(away, ready=False, known=last)
    assert (phase, error) == ("queued", None)
    assert reason.startswith(
        "Slurm does not say how job 8 is (squeue failed: Connection refused); before that: Slurm P"
    )
    assert phase_of(away, ready=False, known=("ready", ""))[0] == "queued", "its heart does not beat any more"
    assert phase_of(away, ready=True, known=("ready", ""))[0] == "ready"


def test_the_loopback_address_never_goes_through_a_proxy() -> None:
    environ = {"http_proxy": "http://proxy:3128", "no_proxy": "cluster.edu,localhost"}
    bypass_proxy(environ)
    assert environ["no_proxy"] == "cluster.edu,localhost,127.0.0.1"
    assert environ["NO_PROXY"] == "127.0.0.1,localhost"
    bypass_proxy(environ)
    assert environ["no_proxy"] == "cluster.edu,localhost,127.0.0.1"


@pytest.mark.parametrize("base_model", ["/m", Path("/m"), ["/m"], (Path("/m"),)])
def test_a_session_takes_the_folder_of_a_model_as_a_path_too(base_model, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []

    @contextlib.contextmanager
    def begin(**given: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(serve=served.append)

    monkeypatch.setattr(service, "Session", begin)
    monkeypatch.setattr(service, "ServiceClient", lambda session: None)
    with service.session(base_model=base_model):
        assert served == ["/m"]


def test_a_session_is_not_begun_for_what_names_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "Session", None)
    with pytest.raises(ConfigError, match="base_model is 3; expected a hub name"), service.session(base_model=3):  # type: ignore[arg-type]
        pass


TINY = Path(__file__).parents[2] / "models" / "tiny-qwen3"
ACCEPTS = "echo 7"
FAILS = "echo 'sbatch: error: Batch job submission failed: {}' >&2; exit 1"
AWAY = FAILS.format("Unable to contact slurm controller (connect failure)")
REFUSES = FAILS.format("Invalid qos specification")
HUNG = FAILS.format("Socket timed out on send/recv operation")


class Cluster:
    """A session whose Slurm answers as it is told to; gateway and keeper play no part here."""

    def __init__(self, tmp_path: Path) -> None:
        self._bin = tmp_path / "bin"
        self._bin.mkdir()
        self.answers("squeue", "exit 0")
        clusters = {"c": {"executor": "slurm", "python": sys.executable}}
        values = {"data_root": str(tmp_path / "root"), "cluster": "c", "clusters": clusters}
        self.session = Session(config=build_config(values, environ={}, has_sbatch=True))
        self.models = []
        for name in ("a", "b", "c"):
            shutil.copytree(TINY, tmp_path / name)
            self.models.append(str(tmp_path / name))

    def answers(self, command: str, script: str) -> None:
        (self._bin / command).write_text(f"#!/bin/sh\n{script}\n")
        (self._bin / command).chmod(0o700)

    def serve(self, model: int, answer: str) -> str:
        self.answers("sbatch", answer)
        return self.session.serve(self.models[model])

    def declared(self) -> list[str]:
        """The models of the declared workers, after a look that nothing else lies there."""
        folder = self.session.folder
        workers = list(folder.workers())
        assert sorted(os.listdir(folder.path / "workers")) == [worker.path.name for worker in workers]
        runs = {folder.run_id, *(run.run_id for run in folder.worker_runs())}
        assert set(os.listdir(folder.data_root / "runs")) == runs
        return [Path((read_json(worker.declaration) or {})["base_model"]).name for worker in workers]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    started: list[subprocess.Popen[bytes]] = []

    def keeper(session: Session) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL))
        return started[-1]

    monkeypatch.setattr(Session, "_start_keeper", keeper)
    monkeypatch.setattr(Session, "_wait_for_gateway", lambda session: None)
    monkeypatch.setattr(sbatch, "_LOOKUP_WAITS_S", (0.0,))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.session.close()


def test_a_model_that_got_no_job_leaves_nothing_and_can_be_served_later(cluster: Cluster) -> None:
    with pytest.raises(SlurmUnavailableError):
        cluster.serve(0, AWAY)
    assert not cluster.session.folder.spec.exists()
    first = cluster.serve(0, ACCEPTS)
    for answer, error in ((AWAY, SlurmUnavailableError), (REFUSES, SubmissionError), (AWAY, SlurmUnavailableError)):
        with pytest.raises(error):
            cluster.serve(1, answer)
        assert cluster.declared() == ["a"]
    second = cluster.serve(1, ACCEPTS)
    assert cluster.declared() == ["a", "b"] and cluster.serve(0, REFUSES) == first != second


@pytest.mark.parametrize("before", [0, 1])
def test_a_model_that_may_have_a_job_keeps_its_folder_and_is_in_nobodys_way(cluster: Cluster, before: int) -> None:
    """Its job may come; served again, it is submitted for the same folder, where two jobs would claim one run."""
    for model in range(before):
        cluster.serve(model, ACCEPTS)
    for answer, error in ((HUNG, SlurmUnavailableError), (AWAY, SlurmUnavailableError), (REFUSES, SubmissionError)):
        with pytest.raises(error):
            cluster.serve(before, answer)
        assert cluster.declared() == ["a", "b"][: before + 1]
    cluster.serve(before + 1, ACCEPTS)
    assert cluster.declared() == ["a", "b", "c"][: before + 2]
    run_id = cluster.serve(before, ACCEPTS)
    assert cluster.declared() == ["a", "b", "c"][: before + 2]
    assert (cluster.session.folder.data_root / "runs" / run_id / "submitted.json").exists()
