"""Watching a run from the terminal: its states, then its output as it comes, then how it ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from tinker_hpc.run_state import combine, read_own_files
from tinker_hpc.runs import Run
from tinker_hpc.waiting import Ended

_LONGEST_PAUSE_S = 0.5  # between looks at the log: what people take for live


class Tail:
    """New text of a file that another process appends to, and that may not exist yet.

    Args: last: of what is there already so many lines only. None: all of it.
    """

    def __init__(self, path: Path, *, last: int | None = None) -> None:
        self._path = path
        self._offset = 0
        if last is not None:
            lines = self.read().splitlines(keepends=True)
            self._offset -= sum(map(len, lines[max(0, len(lines) - last) :]))

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


def follow(run: Run, *, log: str = "loop", tail: int | None = None, out: Callable[[bytes], None]) -> Ended:
    """Report a run until it is over: its states on standard error, the new bytes of one of its logs to `out`.

    Args: tail: of what the log says already so many lines only.
    Raises: ConfigError for a log that cannot exist.
    """
    reporter = Reporter(run.id)
    try:
        return _follow(run, Tail(run.log_path(log), last=tail), reporter.say, reporter.before(out))
    finally:
        reporter.stop()


def _follow(run: Run, tail: Tail, say: Callable[[str], None], out: Callable[[bytes], None]) -> Ended:
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


class Reporter:
    """State lines on standard error; while somebody looks and nothing else is to be seen, a clock that moves."""

    def __init__(self, run_id: str) -> None:
        from rich.console import Console

        self._run_id = run_id
        self._console = Console(stderr=True, highlight=False)
        self._spinner: Any = None

    def say(self, line: str, *, moving: bool = True) -> None:
        """Print a new state, and keep it moving on a terminal until there is output or another state."""
        self.stop()
        moment = time.strftime("%H:%M:%S")
        self._console.print(f"[dim]{moment}[/dim] [bold]{self._run_id}[/bold] {escape(line)}", soft_wrap=True)
        if moving and self._console.is_terminal:
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TextColumn(escape(line)), TimeElapsedColumn())
            self._spinner = Progress(*columns, console=self._console, transient=True, refresh_per_second=2)
            self._spinner.add_task(line, total=None)
            self._spinner.start()

    def stop(self) -> None:
        """Take the moving line away: output is coming, or the end."""
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None

    def before(self, out: Callable[[bytes], None]) -> Callable[[bytes], None]:
        """`out`, after the moving line is out of the way."""

        def write(data: bytes) -> None:
            self.stop()
            out(data)

        return write


def to_stdout(data: bytes) -> None:
    """The run's output, byte for byte."""
    stream = sys.stdout.buffer
    stream.write(data)
    stream.flush()


def to_stderr(data: bytes) -> None:
    """The run's output, where standard output is JSON."""
    click.echo(data, nl=False, err=True)
