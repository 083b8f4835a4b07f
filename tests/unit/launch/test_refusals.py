"""sbatch's answers, as Slurm 22.05.8 words them: what they mean and what the user is told to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launch import sbatch as sbatch_module
from launch.host import CommandResult, LocalHost, scrubbed
from launch.job_spec import JobSpec
from launch.refusals import Verdict, explain_refusal, forbids_requeue, forbids_submission, verdict
from launch.sbatch import sbatch
from tinker_hpc.config import ClusterProfile
from tinker_hpc.errors import SlurmUnavailableError, SubmissionError

SPEC = JobSpec(
    "sft-1", "run", "sft", "m", "/m", ClusterProfile("della", partition="gpu", account="lab", qos="long", memory="9T")
)
FAILED = "sbatch: error: Batch job submission failed: "
NO_NODE = "Requested node configuration is not available"
POLICY = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"


def failed(words: str, code: int = 1) -> CommandResult:
    return CommandResult(("sbatch",), code, "", words)


@pytest.mark.parametrize(
    ("words", "meaning", "told"),
    [
        (f"{FAILED}Invalid partition name specified", "refused", "`sinfo -s`"),
        (f"{FAILED}Invalid account or account/partition combination specified", "refused", "account lab"),
        (f"{FAILED}Invalid qos specification", "refused", "qos long"),
        (f"sbatch: error: Memory specification can not be satisfied\n{FAILED}{NO_NODE}", "refused", "memory 9T"),
        (f"{FAILED}{NO_NODE}", "refused", "can ever offer"),
        (f"{FAILED}Requested time limit is invalid (missing or exceeds some limit)", "refused", "60 min"),
        ("sbatch: error: Invalid --time specification", "refused", "60 min"),
        (f"{FAILED}Invalid feature specification", "refused", "`constraint`"),
        (f"{FAILED}{POLICY}", "refused", "limit of your account"),
        (f"{FAILED}Required partition not available (inactive or drain)", "refused", "takes no jobs now"),
        ("sbatch: error: Invalid generic resource (gres) specification", "refused", "gpu_type"),
        ("sbatch: unrecognized option '--exclud=node7'", "refused", "`extra`"),
        (f"{FAILED}Unable to contact slurm controller (connect failure)", "unreached", None),
        ("sbatch: error: Munge encode failed: Failed to access socket (Did you start munged?)", "unreached", None),
        (f"{FAILED}Rate limit exceeded, please retry later", "unreached", None),
        (f"{FAILED}Slurm backup controller in standby mode", "unreached", None),
        (f"{FAILED}Socket timed out on send/recv operation", "unanswered", None),
        (f"{FAILED}Zero Bytes were transmitted or received", "unanswered", None),
    ],
)  # fmt: skip
def test_verdict_and_advice(words: str, meaning: str, told: str | None) -> None:
    result = failed(words)
    assert verdict(result).value == meaning
    if told is not None:
        error = explain_refusal(result, SPEC)
        assert isinstance(error, SubmissionError) and told in str(error) and "sbatch: error" not in str(error)
        assert error.slurm_words == words  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "forbidden"),
    [
        (f"{FAILED}Access/permission denied", True),
        # A job_submit plugin that says no, as recorded on 22.05; its words come before Slurm's.
        (f"sbatch: error: Please submit from della\n{FAILED}Unspecified error", True),
        ("sbatch: command not available on compute nodes", True),
        (f"sbatch: error: You have too many jobs in the queue\n{FAILED}Unspecified error", False),
        (f"{FAILED}Unspecified error", False),
        (f"{FAILED}{POLICY}", False),
        (f"sbatch: error: AssocMaxSubmitJobLimit\n{FAILED}{POLICY}", False),
        (f"{FAILED}Required partition not available (inactive or drain)", False),
        (f"{FAILED}Requested reservation is invalid", False),
        (f"{FAILED}Access denied to requested reservation", False),
        (f"{FAILED}{NO_NODE}", False),
        ("sbatch: error: Unable to open file /data/runs/r/slurm/job.sbatch", False),
    ],
)  # fmt: skip
def test_what_a_refusal_says_of_the_site(words: str, forbidden: bool) -> None:
    assert forbids_submission(words) is forbidden


def test_what_a_refused_requeue_says_of_the_site() -> None:
    said = "slurm_update error: "
    for_good = ("Requested operation is presently disabled for job 7", "Access/permission denied", "Unspecified error")
    now = ("Invalid job id specified", "Job/step already completing or completed", "Job can not be altered now")
    assert all(forbids_requeue(said + words) for words in for_good)
    assert not any(forbids_requeue(said + words) for words in now)


def test_success_without_an_id_is_not_success() -> None:
    assert verdict(CommandResult(("sbatch",), 0, "", "")) is Verdict.UNANSWERED


@dataclass
class ScriptedHost:
    """Gives the answers of a list, one per call."""

    answers: list[CommandResult | Exception]
    calls: list[str] = field(default_factory=list)

    def run(self, argv: Sequence[str], *, timeout_s: float = 60.0) -> CommandResult:
        self.calls.append(argv[0])
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def ok(out: str) -> CommandResult:
    return CommandResult(("x",), 0, out, "")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sbatch_module, "_LOOKUP_WAITS_S", (0.0, 0.0, 0.0))


def test_the_id_of_a_federated_cluster() -> None:
    assert sbatch(SPEC, Path("job.sbatch"), ScriptedHost([ok("4711;della\n")])) == "4711"
    assert sbatch(SPEC, Path("job.sbatch"), ScriptedHost([ok("please read the news\n4712\n")])) == "4712"


def test_a_lost_answer_is_looked_up_and_never_sent_again() -> None:
    lost = failed(f"{FAILED}Socket timed out on send/recv operation")
    host = ScriptedHost([lost, failed("Unable to contact slurm controller"), ok(""), ok("4711\n")])
    assert sbatch(SPEC, Path("job.sbatch"), host) == "4711"
    assert host.calls == ["sbatch", "squeue", "squeue", "squeue"]
    timed_out = SlurmUnavailableError("`sbatch` gave no answer within 60 s", timed_out=True)
    assert sbatch(SPEC, Path("job.sbatch"), ScriptedHost([timed_out, ok("4711\n")])) == "4711"


def test_a_lost_answer_and_no_job_says_how_to_go_on() -> None:
    host = ScriptedHost([failed(f"{FAILED}Socket timed out on send/recv operation"), ok(""), ok(""), ok("")])
    with pytest.raises(SlurmUnavailableError, match=r"squeue --me --name=sft-1"):
        sbatch(SPEC, Path("job.sbatch"), host)
    assert host.calls.count("sbatch") == 1


def test_a_controller_that_was_not_reached_is_not_asked_again() -> None:
    host = ScriptedHost([failed(f"{FAILED}Unable to contact slurm controller (connect failure)")])
    with pytest.raises(SlurmUnavailableError, match="was not submitted"):
        sbatch(SPEC, Path("job.sbatch"), host)


def test_a_machine_without_slurm() -> None:
    with pytest.raises(SlurmUnavailableError, match="not installed on this machine"):
        LocalHost().run(["sbatch-that-does-not-exist"])
    with pytest.raises(SlurmUnavailableError, match="no answer within"):
        LocalHost().run(["sleep", "5"], timeout_s=0.1)


def test_a_command_that_may_not_be_run_here(tmp_path: Path) -> None:
    """Some sites take the right to run sbatch on compute nodes, and leave the file there."""
    forbidden = tmp_path / "sbatch"
    forbidden.write_text("#!/bin/sh\n")
    with pytest.raises(SlurmUnavailableError, match=r"cannot be started on this .* Permission denied") as caught:
        LocalHost().run([str(forbidden)])
    assert caught.value.attributes["missing"]


def test_what_does_not_leak_into_a_job() -> None:
    inherited = {
        "SLURM_CONF": "/etc/slurm/slurm.conf",
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
        "SLURM_MEM_PER_CPU": "1024",
        "SBATCH_PARTITION": "debug",
        "SRUN_CPUS_PER_TASK": "1",
        "SQUEUE_FORMAT": "%i",
        "PMIX_RANK": "0",
        "HOME": "/home/alice",
        "MY_SLURM_NOTE": "kept",
    }
    assert scrubbed(inherited) == {
        "SLURM_CONF": "/etc/slurm/slurm.conf",
        "HOME": "/home/alice",
        "MY_SLURM_NOTE": "kept",
        "LC_ALL": "C",
        "SLURM_TIME_FORMAT": "%s",
    }
