"""A seeded monkey on a real multi-node Slurm cluster: kills at random, and nothing may be lost or done twice.

    sudo .venv/bin/python tests/benchmarks/faults/run_monkey.py --runs 50 --strikes 5 --out report.json

Runs of an SFT loop and of an RL loop are submitted in turn, some at a time, and struck while they work (plan.py says
with what, strikes.py how). Each must end with what the same loop ends with unharmed: every number it returned, every
tensor of adapter and optimizer, the same requests in the log, each with one answer. The report has every seed and every
blow; `--seed N --runs 1` repeats a run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SLURM_TESTS = HERE.parents[1] / "slurm"
sys.path[:0] = [str(HERE), str(SLURM_TESTS)]

from judge import Left, left_by  # noqa: E402
from plan import Strike, strikes  # noqa: E402
from slurm_machine import PROGRAMS, TINY_MODEL, SlurmCluster  # noqa: E402
from strikes import Striker  # noqa: E402

from tinker_hpc.private_files import read_json  # noqa: E402
from tinker_hpc.run_folder import RunFolder  # noqa: E402

LOOPS = {"sft": ("sft_loop.py", "30", "0.3"), "rl": ("rl_loop.py", "18", "0.3")}
"""Program, steps, and the pause after each: something to strike in between. Long enough that a run seldom ends before
it has had its blows."""
DISK_MIB = 1500
_PROGRESS_PATIENCE_S = 240.0
_RUN_PATIENCE_S = 900.0
_DISK = threading.Lock()


@dataclass
class RunReport:
    """One run."""

    seed: int
    loop: str
    run_id: str = ""
    blows: list[dict[str, Any]] = field(default_factory=list)
    num_jobs: int = 0
    seconds: float = 0.0
    equal: bool = False
    trouble: str = ""


def submit(cluster: SlurmCluster, loop: str) -> dict[str, Any]:
    """One run of a loop, with a job long enough never to meet its time limit here."""
    program, *arguments = LOOPS[loop]
    resources = {"memory": "2G", "time": 60}
    argv = ["python", str(PROGRAMS / program), str(TINY_MODEL), *arguments]
    return cluster.submit(*argv, name=f"monkey-{loop}", resources=resources)


def wait_for_end(cluster: SlurmCluster, run_id: str) -> str:
    """Wait until a run is over; its trouble, or "" if it ended well."""
    folder = cluster.run_folder(run_id)
    deadline = time.monotonic() + _RUN_PATIENCE_S
    while not (folder / "outcome.json").exists():
        if time.monotonic() > deadline:
            return f"not over after {_RUN_PATIENCE_S:.0f} s"
        time.sleep(0.5)
    outcome = read_json(folder / "outcome.json")
    return "" if outcome["state"] == "succeeded" else f"{outcome['reason']}: {outcome['error']}"


def progress_mark(folder: RunFolder) -> tuple[int, int]:
    """Grows when the run gets on: files of the result log, bytes of the metrics."""
    results = sum(1 for path in (folder.worker(0).results).glob("*/seg-*"))
    metrics = folder.worker(0).metrics
    return results, metrics.stat().st_size if metrics.exists() else 0


def harass(cluster: SlurmCluster, report: RunReport, planned: list[Strike], fill: Path) -> None:
    """Strike a run as planned until it is over or the plan is."""
    folder = RunFolder(cluster.run_folder(report.run_id))
    striker = Striker(cluster, report.run_id, LOOPS[report.loop][0], fill)
    mark = progress_mark(folder)
    for strike in planned:
        deadline = time.monotonic() + _PROGRESS_PATIENCE_S
        while strike.waits_for_progress and progress_mark(folder) == mark and not folder.outcome.exists():
            if time.monotonic() > deadline:
                report.trouble = f"no progress for {_PROGRESS_PATIENCE_S:.0f} s before {strike}"
                return
            time.sleep(0.1)
        time.sleep(strike.delay_s)
        if folder.outcome.exists():
            return
        began = time.time()
        with _DISK if strike.what == "disk" else threading.Lock():
            struck = striker.strike(strike)
        report.blows.append({**asdict(strike), "at": began, "struck": struck})
        mark = progress_mark(folder)


def one_run(cluster: SlurmCluster, report: RunReport, num_strikes: int, unharmed: Left, fill: Path) -> RunReport:
    """Submit, strike, wait, compare."""
    began = time.monotonic()
    try:
        answer = submit(cluster, report.loop)
        while answer.get("error") == "SlurmUnavailableError" and not answer.get("job_may_exist"):
            time.sleep(2.0)  # the monkey has its hand on the controller: what a user would do
            answer = submit(cluster, report.loop)
        if "error" in answer:
            raise AssertionError(f"not submitted: {answer['message']}")
        report.run_id = answer["run_id"]
        harass(cluster, report, strikes(report.seed, num_strikes), fill)
        report.trouble = report.trouble or wait_for_end(cluster, report.run_id)
        folder = RunFolder(cluster.run_folder(report.run_id))
        report.num_jobs = len(list(folder.attempts.glob("claim-*")))
        if not report.trouble:
            left = left_by(folder)
            report.equal = left == unharmed
            if not report.equal:
                report.trouble = f"differs: {difference(left, unharmed)}"
    except (AssertionError, OSError, ValueError, subprocess.SubprocessError) as error:
        report.trouble = f"{type(error).__name__}: {error}"
    report.seconds = time.monotonic() - began
    return report


def difference(left: Left, unharmed: Left) -> str:
    """Which parts differ, in a few words."""
    ours, theirs = asdict(left), asdict(unharmed)
    return "; ".join(
        f"{key}: {ours[key]!s:.200} instead of {theirs[key]!s:.200}" for key in ours if ours[key] != theirs[key]
    )


def bench(
    cluster: SlurmCluster,
    *,
    seeds: Sequence[int],
    num_strikes: int,
    parallel: int,
    fill: Path,
    stop_at: float,
    loops: Sequence[str] = tuple(LOOPS),
    out: Path | None = None,
) -> dict[str, Any]:
    """Run it all; the report, also written to `out` after each run. No run is begun after `stop_at` (unix seconds)."""
    unharmed: dict[str, Left] = {}
    for loop, run in {loop: submit(cluster, loop) for loop in loops}.items():
        trouble = wait_for_end(cluster, run["run_id"])
        assert not trouble, f"the unharmed {loop} run failed: {trouble}"
        unharmed[loop] = left_by(RunFolder(cluster.run_folder(run["run_id"])))
    finished: list[RunReport] = []
    written = threading.Lock()
    reports = [RunReport(seed, sorted(loops)[i % len(loops)]) for i, seed in enumerate(seeds)]

    def work(report: RunReport) -> RunReport | None:
        if time.time() > stop_at:
            return None
        done = one_run(cluster, report, num_strikes, unharmed[report.loop], fill)
        words = "equal" if done.equal else done.trouble
        print(
            f"seed {done.seed} {done.loop} {done.run_id}: {len(done.blows)} blows, {done.seconds:.0f} s, {words}",
            flush=True,
        )
        with written:
            finished.append(done)
            if out is not None:
                out.write_text(json.dumps(report_of(finished, num_strikes), indent=1))
        return done

    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(work, reports))
    return report_of(finished, num_strikes)


def report_of(finished: list[RunReport], num_strikes: int) -> dict[str, Any]:
    """The whole report, runs by their seeds."""
    ordered = sorted(finished, key=lambda report: report.seed)
    return {**summary(ordered), "num_strikes_planned": num_strikes, "runs": [asdict(report) for report in ordered]}


def summary(finished: list[RunReport]) -> dict[str, Any]:
    """The numbers people ask for."""
    landed = [blow for report in finished for blow in report.blows if blow["struck"]]
    return {
        "num_runs": len(finished),
        "num_equal": sum(report.equal for report in finished),
        "num_blows": len(landed),
        "num_kills": sum(blow["how"] in ("KILL", "TERM") for blow in landed),
        "blows_by_kind": dict(sorted(Counter(f"{blow['what']} {blow['how']}" for blow in landed).items())),
        "num_jobs": sum(report.num_jobs for report in finished),
        "troubles": [f"seed {r.seed}: {r.trouble}" for r in finished if r.trouble],
    }


def bring_up() -> tuple[SlurmCluster, Path]:
    """A cluster of its own, alice's data root on a disk of its own that can be filled without hurting anybody."""
    from conftest import give_configuration, make_cluster

    cluster = make_cluster("faults")
    data_root = cluster.home("alice") / "tinker_hpc_data"
    take_down(cluster)
    cluster.base.mkdir(parents=True)
    disk = cluster.base.parent / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=755", "tmpfs", str(disk)], check=True)
    cluster.script("up", "--no-cgroup", "--nodes", "3", "--cpus", "8", "--mem", "8000", "--gpus", "0")
    home = cluster.home("alice").stat()
    inside = disk / "alice"
    inside.mkdir(mode=0o700)
    subprocess.run(["chown", f"{home.st_uid}:{home.st_gid}", str(inside)], check=True)
    data_root.symlink_to(inside)
    give_configuration(cluster, "alice")
    give_configuration(cluster, "bob")
    return cluster, disk / "fill"


def take_down(cluster: SlurmCluster) -> None:
    """The cluster and the disk, also those of a run before that was killed."""
    cluster.script("down", "--purge", check=False)
    disk = cluster.base.parent / "disk"
    subprocess.run(["umount", str(disk)], check=False, capture_output=True)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--strikes", type=int, default=5, help="planned per run; a run may be over before the last")
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the next has the next")
    parser.add_argument("--seeds", type=int, nargs="+", help="of every run, instead of --runs and --seed")
    parser.add_argument("--parallel", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no run after so long")
    parser.add_argument("--loops", nargs="+", choices=sorted(LOOPS), default=sorted(LOOPS))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    cluster, fill = bring_up()
    began = time.time()
    try:
        report = bench(
            cluster,
            seeds=arguments.seeds or range(arguments.seed, arguments.seed + arguments.runs),
            num_strikes=arguments.strikes,
            parallel=arguments.parallel,
            fill=fill,
            stop_at=began + 60 * arguments.minutes,
            loops=arguments.loops,
            out=arguments.out,
        )
    finally:
        take_down(cluster)
    report["minutes"] = (time.time() - began) / 60
    arguments.out.write_text(json.dumps(report, indent=1))
    print(json.dumps({key: value for key, value in report.items() if key != "runs"}, indent=1))
    sys.exit(0 if report["num_equal"] == report["num_runs"] else 1)


if __name__ == "__main__":
    main()
