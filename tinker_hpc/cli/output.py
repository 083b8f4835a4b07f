"""How things are printed: JSON for programs, aligned words for people."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click


def emit(value: Any) -> None:
    """One line of JSON on standard output, at once."""
    click.echo(json.dumps(value))
    sys.stdout.flush()


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their content; the last one is cut at the terminal's edge."""
    rows = [[" ".join(text.split()) for text in row] for row in rows]  # a reason may be a traceback's last lines
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    room = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 10_000
    for row in [headers, *rows]:
        line = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        click.echo(line if len(line) <= room else f"{line[: room - 1]}…")


def fields(values: Mapping[str, Any]) -> None:
    """`name  value` lines; what is None or empty is left out."""
    shown = {name: str(value) for name, value in values.items() if value not in (None, "", ())}
    width = max((len(name) for name in shown), default=0)
    for name, value in shown.items():
        click.echo(f"{name.ljust(width)}  {value}")


@contextlib.contextmanager
def bytes_written(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error while somebody looks; yields what is told the bytes done and those in all."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def clock_text(seconds: float | None) -> str:
    """A moment, in this machine's time zone; "" if it is not known."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def age_text(since: float | None, now: float | None = None) -> str:
    """`40s`, `12m`, `5h`, `3d`: how long ago."""
    if not since:
        return ""
    seconds = max(0.0, (time.time() if now is None else now) - since)
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"


def size_text(num_bytes: float) -> str:
    """`812 B`, `3.4 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError("unreachable")
