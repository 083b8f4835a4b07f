"""One benchmark's outcome as a JSON file: enough to know what was measured, on what, and how well.

    options = parser(__doc__, quick="a small model", repeats=5, warmup=1).parse_args()
    outcome = Outcome("throughput", config={...}, warmup=1, repeats=5)
    outcome.add("training", "tokens_per_s", {"tinker_hpc": [...], "transformers_peft": [...]})
    outcome.finish(options.results)                   # results/throughput-cpu-2026-11-24.json, and all numbers printed

Times are taken interleaved (a, b, a, b, ...), so that whatever else the machine does meets both sides; a ratio is the
median of the ratios of such pairs. table.py turns all files into results/README.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Where a benchmark finds what it borrows from the tests, and the packages if they are not installed: all import this.
sys.path += [str(HERE.parent / folder) for folder in (".", "models", "distributed", "contract", "..")]
RESULTS = HERE / "results"
PACKAGES = ("torch", "megatron-core", "transformers", "peft", "tinker")


def parser(doc: str | None, *, quick: str, repeats: int, warmup: int | None = None) -> argparse.ArgumentParser:
    """The options that every benchmark has; a benchmark without `warmup` has none. From here on nothing is looked up on
    a hub, and megatron-core and peft do not warn about optional packages.
    """
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help=quick)
    options.add_argument("--repeats", type=int, default=repeats)
    if warmup is not None:
        options.add_argument("--warmup", type=int, default=warmup)
    options.add_argument("--results", type=Path, help="folder to write to, instead of results/")
    return options


@dataclass
class Outcome:
    """`metrics`: case -> metric (unit in its name) -> side -> median, p10, p90; and the ratio of the first to each."""

    what: str
    config: dict[str, Any]
    warmup: int
    repeats: int
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    load_before: tuple[float, float, float] = field(default_factory=os.getloadavg)

    def add(self, case: str, metric: str, sides: Mapping[str, Sequence[float]]) -> None:
        """One value per repeat and side; the first side is ours, the others what it is measured beside."""
        (first, ours), *others = sides.items()
        entry: dict[str, Any] = {side: spread(values) for side, values in sides.items()}
        for side, theirs in others:
            if not all(theirs):  # a difference may be none at all
                continue
            pairs = zip(ours, theirs, strict=True)
            entry[f"ratio_{first}_to_{side}"] = spread([mine / other for mine, other in pairs])
        self.metrics.setdefault(case, {})[metric] = entry

    def finish(self, folder: Path | None) -> Path:
        """Print every number and write the record, into results/ if not elsewhere."""
        for case, metrics in self.metrics.items():
            for metric, sides in metrics.items():
                for side, row in sides.items():
                    what = f"{case:34} {metric:20} {side:38}"
                    print(f"{what} {row['median']:10g}  ({row['p10']:g} to {row['p90']:g})")
        return self.write(folder or RESULTS)

    def write(self, folder: Path = RESULTS) -> Path:
        """Write results/<what>-<device>-<date>.json; a second run of a day replaces the first."""
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        device = device_facts(self.load_before)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.what}-{device['kind']}-{date}.json"
        record = {
            "what": self.what,
            "date": date,
            "commit": commit(),
            "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "device": device,
            "config": self.config,
            "warmup": self.warmup,
            "repeats": self.repeats,
            "metrics": self.metrics,
        }
        path.write_text(json.dumps(record, indent=2) + "\n")
        return path


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, to four significant digits."""
    ordered = sorted(values)

    def percentile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    figures = {"median": statistics.median(ordered), "p10": percentile(0.1), "p90": percentile(0.9)}
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def device_facts(load_before: tuple[float, float, float]) -> dict[str, Any]:
    """What the numbers were measured on. A load above the threads used says that the machine was shared."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "kind": "cuda" if cuda else "cpu",
        "name": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1_min_before": round(load_before[0], 2),
        "load_average_1_min_after": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    """The checked-out commit, marked where files differ from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":!tests/benchmarks/results")
        return head + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=HERE, check=True, capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
