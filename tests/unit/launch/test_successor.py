"""Which way a job is continued where a site refuses this or that, and in which order a run's jobs are ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from launch import lineage, site
from launch import sbatch as sbatch_module
from launch.cancel import cancel
from launch.host import CommandResult
from launch.job_spec import JobSpec
from launch.submitted import SubmittedJob
from launch.successor import Successor, take_back
from tinker_hpc.config import ClusterProfile
from tinker_hpc.errors import SlurmUnavailableError
from tinker_hpc.private_files import read_json, write_json
from tinker_hpc.run_folder import RunFolder

FORBIDDEN = "sbatch: error: Batch job submission failed: Access/permission denied"
DISABLED = "Requested operation is presently disabled for job 7"
LIMIT = (
    "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates "
    "accounting/QOS policy (job submit limit, user's size and/or time limits)"
)


class Queue:
    """A host with a queue: jobs by id and state; refuses what it is told to refuse, as Slurm's words or by silence."""

    def __init__(self, run_id: str, **jobs: str) -> None:
        self.run_id = run_id
        self.jobs = {job_id.lstrip("j"): state for job_id, state in jobs.items()}
        self.refuses: dict[str, str] = {}
        self.silent: set[str] = set()
        self.missing: set[str] = set()
        self.calls: list[str] = []
        self.on_cancel: Callable[[], None] = lambda: None

    def run(self, argv: Sequence[str], *, timeout_s: float = 60.0) -> CommandResult:
        words = " ".join(argv)
        if argv[0] in self.missing:
            raise SlurmUnavailableError(f"`{argv[0]}` is not installed on this machine", missing=True)
        self.calls.append(words)
        if argv[0] in self.silent:
            raise SlurmUnavailableError(f"`{words}` gave no answer within {timeout_s:.0f} s", timed_out=True)
        for start, refusal in self.refuses.items():
            if words.startswith(start):
                return CommandResult(tuple(argv), 1, "", refusal)
        out = ""
        if argv[0] == "squeue":
            only_ids = argv[-2:] == ["-o", "%A"]
            rest = "" if only_ids else f"|{self.run_id}|{{}}|None|0|0|0|0:01|n1"
            out = "\n".join(f"{i}{rest.format(state)}" for i, state in self.jobs.items())
        elif argv[0] == "sbatch":
            job_id = str(max(map(int, self.jobs), default=0) + 1)
            self.jobs[job_id] = "PENDING"
            out = job_id
        elif argv[0] == "scancel":
            for job_id in argv[1:]:
                if job_id in self.jobs:
                    self.jobs[job_id] = "CANCELLED"
            self.on_cancel()
        return CommandResult(tuple(argv), 0, out + "\n", "")


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    folder = RunFolder.new(root, "r")
    write_json(folder.submitted, SubmittedJob("7", "della", 0.0, folder.run_id, "slurm", str(folder.path)).to_json())
    (folder.slurm / "7_submitted.pkl").write_bytes(b"pickle")
    return folder


def spec_of(folder: RunFolder) -> JobSpec:
    return JobSpec(folder.run_id, "run", "r", "m", "/m", ClusterProfile("della"))


def test_a_chain_where_nothing_is_refused(run_folder: RunFolder) -> None:
    host = Queue(run_folder.run_id, j7="RUNNING")
    successor = Successor(spec_of(run_folder), run_folder, host, "7")
    assert successor.step() and successor.how == "chain"
    (call,) = [call for call in host.calls if call.startswith("sbatch")]
    assert "--dependency=afternotok:7 --kill-on-invalid-dep=yes" in call
    assert [job.job_id for job in lineage.jobs_of(run_folder)] == ["7", "8"]
    assert (run_folder.slurm / "8_submitted.pkl").read_bytes() == b"pickle"
    assert not successor.step(), "once is enough"
    # Started a second time (requeued by an administrator), it finds its successor in the queue.
    again = Successor(spec_of(run_folder), run_folder, host, "7")
    assert again.step() and again.how == "chain" and len(lineage.jobs_of(run_folder)) == 2
    take_back(run_folder, host, own_job_id="7", run_id=run_folder.run_id)
    assert host.jobs == {"7": "RUNNING", "8": "CANCELLED"}


def test_a_site_without_sbatch_on_its_nodes_is_remembered(run_folder: RunFolder) -> None:
    host = Queue(run_folder.run_id, j7="RUNNING")
    host.refuses = {"sbatch": FORBIDDEN}
    successor = Successor(spec_of(run_folder), run_folder, host, "7")
    assert successor.step() and successor.how == "requeue"
    assert "scontrol update JobId=7 Requeue=1" in host.calls
    assert site.continuation(run_folder.data_root, spec_of(run_folder)) == "requeue"
    assert FORBIDDEN in read_json(run_folder.data_root / "sites" / "della.json")["words"]
    assert successor.requeue() and host.calls[-1] == "scontrol requeue 7"
    host.calls.clear()
    assert Successor(spec_of(run_folder), run_folder, host, "7").step()
    assert not [call for call in host.calls if call.startswith("sbatch")], "not tried again"


def test_neither_leaves_a_ladder_to_the_client(run_folder: RunFolder) -> None:
    host = Queue(run_folder.run_id, j7="RUNNING")
    host.refuses = {"sbatch": FORBIDDEN, "scontrol update": DISABLED}
    first = Successor(spec_of(run_folder), run_folder, host, "7")
    assert first.step() and first.how is None and "disabled" in (first.trouble or "")
    assert site.continuation(run_folder.data_root, spec_of(run_folder)) == "ladder"
    host.jobs["8"] = "PENDING"  # a rung that the client submitted with the next run
    rung = Successor(spec_of(run_folder), run_folder, host, "7")
    assert rung.step() and rung.how == "ladder"


NO_CONTACT = "Unable to contact slurm controller (connect failure)"


@pytest.mark.parametrize("how", ["scontrol", f"slurm_update error: {NO_CONTACT}", "Socket timed out on send/recv"])
@pytest.mark.parametrize("known", ["requeue", "chain"])
def test_scontrol_without_an_answer_is_asked_again(
    run_folder: RunFolder, monkeypatch: pytest.MonkeyPatch, known: site.Continuation, how: str
) -> None:
    """It must neither end the job nor change what is known of the site."""
    spec = spec_of(run_folder)
    if known == "requeue":
        site.learn(run_folder, spec, known, "")
    host = Queue(run_folder.run_id, j7="RUNNING")
    host.refuses = {"sbatch": FORBIDDEN}
    if how == "scontrol":
        host.silent = {how}
    else:
        host.refuses["scontrol"] = how
    successor = Successor(spec, run_folder, host, "7")
    assert successor.step() and successor.how is None and successor.trouble
    assert site.continuation(run_folder.data_root, spec) == known
    assert not successor.step(), "not before half a minute has passed"
    host.silent.clear()
    host.refuses.pop("scontrol", None)
    later = time.monotonic() + 31
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert successor.step() and (successor.how, successor.trouble) == ("requeue", None)
    assert site.continuation(run_folder.data_root, spec) == "requeue"


def test_nodes_without_any_slurm_command_leave_a_ladder_to_the_client(run_folder: RunFolder) -> None:
    host = Queue(run_folder.run_id, j7="RUNNING")
    host.missing = {"sbatch", "scontrol", "squeue"}
    first = Successor(spec_of(run_folder), run_folder, host, "7")
    assert first.step() and first.how is None and "not installed" in (first.trouble or "")
    assert site.continuation(run_folder.data_root, spec_of(run_folder)) == "ladder"
    rung = SubmittedJob("8", "della", 0.0, run_folder.run_id, "slurm", str(run_folder.path))
    lineage.remember(run_folder, rung)
    lower, last = (Successor(spec_of(run_folder), run_folder, host, job_id) for job_id in ("7", "8"))
    assert lower.step() and lower.how == "ladder", "known from the run's own list, where there is no squeue"
    assert last.step() and last.how is None and "resume" in (last.trouble or "")


@pytest.mark.parametrize("known", ["chain", "requeue", "ladder"])
def test_a_queue_that_is_not_shown_is_not_an_empty_one(
    run_folder: RunFolder, monkeypatch: pytest.MonkeyPatch, known: site.Continuation
) -> None:
    spec = spec_of(run_folder)
    site.learn(run_folder, spec, known, "")
    host = Queue(run_folder.run_id, j7="RUNNING", j8="PENDING")
    host.refuses = {"squeue": f"slurm_load_jobs error: {NO_CONTACT}", "scontrol update": DISABLED}
    successor = Successor(spec, run_folder, host, "7")
    assert successor.step() and successor.how is None and NO_CONTACT in (successor.trouble or "")
    del host.refuses["squeue"]
    later = time.monotonic() + 31
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert successor.step() and successor.trouble is None
    assert successor.how == ("chain" if known == "chain" else "ladder") and host.jobs["8"] == "PENDING"
    assert not [call for call in host.calls if call.startswith("sbatch")], "one waits already"


def test_a_successor_whose_submission_was_never_answered_can_start(
    run_folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A controller that hung makes the job when it wakes; without its pickle submitit's entry point ends it."""
    monkeypatch.setattr(sbatch_module, "_LOOKUP_WAITS_S", (0.0,))
    host = Queue(run_folder.run_id, j7="RUNNING")
    host.refuses = {"sbatch": "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"}
    successor = Successor(spec_of(run_folder), run_folder, host, "7")
    assert successor.step() and successor.how is None
    host.jobs["8"] = "PENDING"
    later = time.monotonic() + 31
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert successor.step() and successor.how == "chain" and list(host.jobs) == ["7", "8"]
    assert [job.job_id for job in lineage.jobs_of(run_folder)] == ["7", "8"]
    assert (run_folder.slurm / "8_submitted.pkl").read_bytes() == b"pickle"


def test_a_rung_that_comes_late_is_found(run_folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first job of a ladder may start while the client still submits the others; later it asks less often."""
    site.learn(run_folder, spec_of(run_folder), "ladder", "")
    host = Queue(run_folder.run_id, j7="RUNNING")
    successor = Successor(spec_of(run_folder), run_folder, host, "7")
    began = time.monotonic()
    asked = []
    for second in range(1800):
        monkeypatch.setattr(time, "monotonic", lambda second=second: began + second)
        before = len(host.calls)
        successor.step()
        if len(host.calls) > before:
            asked.append(second)
    assert asked[:2] == [0, 30] and len(asked) <= 10 and successor.how is None
    host.jobs["8"] = "PENDING"
    monkeypatch.setattr(time, "monotonic", lambda: began + 2100)
    assert successor.step() and (successor.how, successor.trouble) == ("ladder", None)


@pytest.mark.parametrize(
    "words",
    [
        LIMIT,
        "sbatch: error: Batch job submission failed: Required partition not available (inactive or drain)",
        "sbatch: error: Batch job submission failed: Requested reservation is invalid",
        "sbatch: error: Batch job submission failed: Unspecified error",
    ],
)
def test_what_is_refused_now_is_no_property_of_the_site(
    run_folder: RunFolder, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """Until Slurm takes a successor the job may be requeued, so that a preemption is not the run's end."""
    host = Queue(run_folder.run_id, j7="RUNNING")
    host.refuses = {"sbatch": words}
    successor = Successor(spec_of(run_folder), run_folder, host, "7")
    assert successor.step() and (successor.how, successor.trouble) == ("requeue", None)
    assert site.continuation(run_folder.data_root, spec_of(run_folder)) == "chain"
    began = time.monotonic()
    for second in range(3600):
        monkeypatch.setattr(time, "monotonic", lambda second=second: began + second)
        assert not successor.step()
    assert len([call for call in host.calls if call.startswith("sbatch")]) <= 13, "every five minutes"
    host.refuses = {}
    monkeypatch.setattr(time, "monotonic", lambda: began + 3901)
    assert successor.step() and successor.how == "chain" and host.jobs["8"] == "PENDING"
    assert host.calls[-1] == "scontrol update JobId=7 Requeue=0", "or there would be two to go on"


def test_neither_a_successor_nor_a_requeue_now(run_folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Queue(run_folder.run_id, j7="RUNNING")
    host.refuses = {"sbatch": LIMIT, "scontrol update": DISABLED}
    successor = Successor(spec_of(run_folder), run_folder, host, "7")
    assert successor.step() and successor.how is None and "policy" in (successor.trouble or "")
    assert site.continuation(run_folder.data_root, spec_of(run_folder)) == "chain"
    assert not successor.step(), "not before half a minute has passed"
    host.refuses = {}
    later = time.monotonic() + 31
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert successor.step() and successor.how == "chain" and successor.trouble is None


def test_a_job_that_slurm_forgot_says_nothing_of_the_site(run_folder: RunFolder) -> None:
    host = Queue(run_folder.run_id, j7="RUNNING")
    host.refuses = {"sbatch": FORBIDDEN, "scontrol update": "slurm_update error: Invalid job id specified"}
    successor = Successor(spec_of(run_folder), run_folder, host, "7")
    assert successor.step() and successor.how is None and "Invalid job id" in (successor.trouble or "")
    assert site.continuation(run_folder.data_root, spec_of(run_folder)) == "chain"


def test_a_successor_that_slurm_forgot_is_submitted_again(
    run_folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Queue(run_folder.run_id, j7="RUNNING")
    successor = Successor(spec_of(run_folder), run_folder, host, "7")
    assert successor.step() and list(host.jobs) == ["7", "8"]
    del host.jobs["8"]  # the controller died before it had written down what it had acknowledged
    assert not successor.step(), "looked for every five minutes"
    began = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: began + 301)
    host.refuses = {"squeue": "slurm_load_jobs error: Unable to contact slurm controller"}
    assert not successor.step() and successor.how == "chain", "no answer is no news"
    host.refuses = {}
    monkeypatch.setattr(time, "monotonic", lambda: began + 602)
    assert successor.step() and successor.how == "chain" and successor.trouble is None
    assert list(host.jobs) == ["7", "8"] and len([call for call in host.calls if call.startswith("sbatch")]) == 2
    monkeypatch.setattr(time, "monotonic", lambda: began + 903)
    assert not successor.step(), "it waits"


def test_those_that_wait_are_ended_first_and_latecomers_too(run_folder: RunFolder) -> None:
    host = Queue(run_folder.run_id, j7="RUNNING", j8="PENDING")
    late = iter(["9"])

    def job_seven_submits_another() -> None:
        for job_id in late:
            host.jobs[job_id] = "PENDING"

    host.on_cancel = job_seven_submits_another
    cancel(lineage.jobs_of(run_folder), host=host)
    assert set(host.jobs.values()) == {"CANCELLED"}
    ended = [call.split()[2:] for call in host.calls if call.startswith("scancel")]
    assert ended[0] == ["8"] and sorted(job_id for call in ended[1:] for job_id in call) == ["7", "9"]
