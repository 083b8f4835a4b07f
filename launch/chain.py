"""A job of a run ended, or one starts: does the run go on? (pure)

A run is worked on by one job after another. Each of them is an *attempt*. The rule, in three sentences:

1. What ended by itself is over: the loop returned or raised, the worker cannot start, the memory did not suffice, the
   configuration is wrong, the user cancelled.
2. What was ended from outside goes on in the next job: preemption, a lost node, the time limit, an administrator's
   scancel, a supervisor killed without a word.
3. But not for ever: a whole time limit without one new answer is the end, and so is the third attempt in a row that
   brought none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

MAX_IN_VAIN = 3
"""Attempts in a row without a new answer. Three: preempted while the model loads happens, thrice in a row rarely."""

WITHOUT_A_WORD = "killed"
"""The reason of an attempt that left none: SIGKILL, a lost node, a grace time of 0."""
SUPERSEDED = "superseded"
"""It gave way to the attempt after it: a copy that Slurm thought dead."""
SCANCELLED = "scancelled"
"""Somebody's scancel, not `tinker-hpc cancel`. Whose, accounting tells: the owner's own ends the run. Where there is no
accounting the run goes on: an administrator's must not end it."""
UNEXPLAINED = (WITHOUT_A_WORD, SCANCELLED)
"""Reasons of which Slurm knows more than the attempt did."""

FROM_OUTSIDE = {
    WITHOUT_A_WORD: "its job was killed",
    "preempted": "it was preempted",
    "node_fail": "its node went down",
    "time_limit": "its time limit was over",
    "signal": "its job was ended by a signal",
    SUPERSEDED: "its node had been given up by Slurm",
    SCANCELLED: "its job was cancelled by an administrator",
}
"""Reasons after which a run goes on, in words."""


@dataclass(frozen=True)
class Attempt:
    """One job's work on a run, as far as the rule needs it."""

    number: int
    job_id: str
    reason: str
    """Why it ended: a `reason` of outcome.json, or one of the constants above."""
    progress: bool
    """Whether it brought the run forward: a new answer, or for a worker without a loop that it took requests."""
    error: str | None = None
    exit_code: int = 1


@dataclass(frozen=True)
class Verdict:
    """Whether the run goes on, and why (or why not), for people."""

    goes_on: bool
    why: str
    reason: str = ""
    """For outcome.json where the run does not go on."""


def verdict(attempts: Sequence[Attempt], *, cancelled: bool) -> Verdict:
    """Whether another job may work on the run after these attempts, oldest first.

    Args:
        attempts: every attempt since the run was submitted or resumed; all have ended.
        cancelled: the user asked for the end (`cancel.json`).
    """
    if cancelled:
        return Verdict(False, "cancelled on request", "cancelled")
    if not attempts:
        return Verdict(True, "the first job of the run")
    last = attempts[-1]
    if last.reason not in FROM_OUTSIDE:
        return Verdict(False, last.error or f"ended by itself ({last.reason})", last.reason)
    said = FROM_OUTSIDE[last.reason]
    if last.progress:
        return Verdict(True, said)
    if last.reason == "time_limit":
        return Verdict(False, "the time limit is over and not one new answer was computed within it", "time_limit")
    in_vain = next((i for i, attempt in enumerate(reversed(attempts)) if attempt.progress), len(attempts))
    if in_vain >= MAX_IN_VAIN:
        return Verdict(
            False,
            f"the last {in_vain} jobs of this run brought not one new answer; the last one ended because {said}",
            last.reason if last.reason in ("preempted", "node_fail") else "signal",
        )
    return Verdict(True, said)


_WORDS = {
    "NODE_FAIL": "node_fail",
    "BOOT_FAIL": "node_fail",
    "TIMEOUT": "time_limit",
    "PREEMPTED": "preempted",
    "OUT_OF_MEMORY": "out_of_memory",
}


def explained(attempt: Attempt, slurm_state: str, *, uid: int) -> Attempt:
    """An attempt that could not say how it ended, with what Slurm says about its job.

    Args:
        slurm_state: Slurm's own words, e.g. "CANCELLED by 2001"; "" where it does not say.
        uid: of the run's owner: whose own scancel is the wish to end the run.
    """
    if attempt.reason not in UNEXPLAINED or not slurm_state:
        return attempt
    first, *rest = slurm_state.split()
    if first == "CANCELLED":
        if rest == ["by", str(uid)]:
            return replace(attempt, reason="cancelled", error=f"its owner ended job {attempt.job_id} with scancel")
        return replace(attempt, reason=SCANCELLED)
    return replace(attempt, reason=_WORDS.get(first, attempt.reason))
