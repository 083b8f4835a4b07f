"""What ranks are asked to run: a scenario, under a layout, on a family's tiny model.

Starting a rank costs far more than the tiny models do. So all jobs that need the same number of ranks are run by one
start of them, which changes from layout to layout and from model to model as it goes.
"""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gloo_launcher import run_ranks
from parity_reference import EXPERTS, Reference

from megatron_adapters.interface import Layout

# TP2 is TP2 with sequence parallelism: the engine has no TP without it.
LAYOUTS = {
    "TP1": Layout(1, 1),
    "TP2": Layout(2, 1),
    "PP2": Layout(1, 1, 2),
    "TP2×PP2": Layout(2, 1, 2),
    "DP2": Layout(1, 2),
    "TP2×DP2": Layout(2, 2),
    "EP2": Layout(1, 2, 1, 2),
    "TP2+EP2": Layout(2, 1, 1, 2),
    "TP2+EP4": Layout(2, 2, 1, 4),
    "PP2+EP2": Layout(1, 2, 2, 2),
    "EP4": Layout(1, 4, 1, 4),
}
"""EP shares the ranks of TP and DP: EP2 is two data-parallel ranks, TP2+EP2 two tensor-parallel ones, TP2+EP4 both."""


def applies(layout: str, family: str) -> bool:
    """Whether the family can be run so at all: experts are spread only where there are some."""
    return LAYOUTS[layout].ep_size == 1 or family in EXPERTS


@dataclass(frozen=True)
class Job:
    """One thing to run. Its outcome is what rank 0's call of the scenario returns."""

    layout: str
    scenario: str
    """`module:function` in this folder; called with a Ground"""
    family: str
    given: Job | None = None
    """another job whose outcome this one takes"""
    also: tuple[str, ...] = ()
    """further families whose reference it reads"""

    @property
    def num_ranks(self) -> int:
        return LAYOUTS[self.layout].world_size

    def __str__(self) -> str:
        return f"{self.layout}-{self.family}"


@dataclass(frozen=True)
class Ground:
    """What a scenario stands on."""

    layout: Layout
    family: str
    references: Mapping[str, Reference]
    folder: Path
    """of its own, and there on every rank"""
    given: Any

    @property
    def reference(self) -> Reference:
        return self.references[self.family]


def run_jobs(jobs: list[Job], references: dict[str, Reference], folder: Path, known: dict[Job, Any]) -> dict[Job, Any]:
    """On every rank: the jobs in order. known: outcomes of jobs that other ranks ran before."""
    outcomes = dict(known)
    for number, job in enumerate(jobs):
        started = time.process_time()
        own = folder / str(number)
        own.mkdir(parents=True, exist_ok=True)
        module, function = job.scenario.split(":")
        given = outcomes[job.given] if job.given else None
        ground = Ground(LAYOUTS[job.layout], job.family, references, own, given)
        outcomes[job] = getattr(importlib.import_module(module), function)(ground)
        gc.collect()  # the last engine: megatron-core's modules are cycles
        print(f"{job.scenario} {job}: {time.process_time() - started:.1f} s of CPU", flush=True)  # in the rank's log
    return {job: outcomes[job] for job in jobs}


class Outcomes:
    """outcomes(job): runs it, and with it every planned job that needs as many ranks. Each job once."""

    def __init__(self, planned: Iterable[Job], reference: Callable[[str], Reference], folder: Path) -> None:
        self._planned = list(_with_givens(planned))
        self._reference = reference
        self._folder = folder
        self._done: dict[Job, Any] = {}
        self._failed: dict[int, BaseException] = {}

    def __call__(self, job: Job) -> Any:
        if job.num_ranks in self._failed:  # once is enough: every test would wait for the same failure
            raise self._failed[job.num_ranks]
        if job not in self._done:
            try:
                self._run(job)
            except BaseException as error:
                self._failed[job.num_ranks] = error
                raise
        return self._done[job]

    def _run(self, asked: Job) -> None:
        wanted = dict.fromkeys([*self._planned, *_with_givens([asked])])
        jobs = [job for job in wanted if job.num_ranks == asked.num_ranks and job not in self._done]
        outside = [job.given for job in jobs if job.given and job.given.num_ranks != asked.num_ranks]
        known = {job: self(job) for job in outside}
        families = dict.fromkeys(family for job in jobs for family in (job.family, *job.also))
        references = {family: self._reference(family) for family in families}
        folder = self._folder / f"{asked.num_ranks}-ranks-{len(self._done)}"
        timeout_s = 120.0 + 60.0 * len(jobs)
        self._done |= run_ranks(
            "jobs:run_jobs", asked.num_ranks, folder, jobs, references, folder, known, timeout_s=timeout_s
        )


def _with_givens(jobs: Iterable[Job]) -> Iterable[Job]:
    """Every job after the one it is given the outcome of."""
    for job in jobs:
        if job.given:
            yield from _with_givens([job.given])
        yield job
