"""Watching a run from the terminal: its states, then its output as it comes, then how it ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from tinker_hpc.run_state import combine, read_own_files
from tinker_hpc.runs import Run
from tinker_hpc.waiting import Ended

_LONGEST_PAUSE_S = 0.5  # between looks at the log: what people take for live


class Tail:
    """New text of a file that another process appends to, and that may not exist yet."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self._path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0

    def read(self) -> bytes:
        """What was added since the last call. Opened anew each time: NFS shows growth to a fresh descriptor."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return b""
        self._offset += len(data)
        return data


def follow(run: Run, *, log: str = "loop", say: Callable[[str], None], out: Callable[[bytes], None]) -> Ended:
    """Report a run until it is over.

    Args:
        log: which log to show.
        say: gets one line whenever the state changes.
        out: gets the log's new bytes.
    """
    path = run.log_paths.get(log) or run.folder.logs / f"{log}.log"
    tail = Tail(path)
    waiter = run.waiter()
    said = ""
    while True:
        step = waiter.step()
        line = _state_line(run, waiter.job)
        if line != said:
            said = line
            say(line)
        if data := tail.read():
            out(data)
        if isinstance(step, Ended):
            return step
        for pause in _slices(step):
            time.sleep(pause)
            if data := tail.read():
                out(data)


def _slices(seconds: float) -> Iterator[float]:
    while seconds > 0:
        yield min(seconds, _LONGEST_PAUSE_S)
        seconds -= _LONGEST_PAUSE_S


def _state_line(run: Run, job: object) -> str:
    own = read_own_files(run.folder)
    status = combine(run.id, own, job)  # type: ignore[arg-type]
    text = status.state.value
    if status.reason:
        text += f" ({' '.join(status.reason.split())})"
    if status.estimated_start and not status.finished:
        text += f", estimated start {time.strftime('%a %H:%M', time.localtime(status.estimated_start))}"
    if status.phase in ("starting", "ready") and not status.finished:
        text += f", worker {status.phase}"
    return text


def say_on_stderr(run: Run) -> Callable[[str], None]:
    """Prints state lines beside the run's own output; with colour where somebody looks."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)

    def say(line: str) -> None:
        console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] [bold]{run.id}[/bold] {line}", soft_wrap=True)

    return say


def to_stdout(data: bytes) -> None:
    """The run's output, byte for byte."""
    stream = sys.stdout.buffer
    stream.write(data)
    stream.flush()


def to_stderr(data: bytes) -> None:
    """The run's output, where standard output is JSON."""
    click.echo(data, nl=False, err=True)
