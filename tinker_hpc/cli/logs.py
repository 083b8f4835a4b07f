"""`logs`: a run's output, from pending to the end."""

from __future__ import annotations

import click

from tinker_hpc.cli.options import json_option
from tinker_hpc.cli.output import emit


@click.command()
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the run is over.")
@click.option("--which", default="loop", show_default=True, help="loop, worker-0, gateway, keeper or job/FILE.")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="The last N lines only; -f goes on from there.")
@json_option
@click.argument("run_id", metavar="ID")
def logs(run_id: str, following: bool, which: str, tail: int | None, as_json: bool) -> int:
    """Print a run's output; -f follows it."""
    from tinker_hpc.cli.follow import follow, to_stdout
    from tinker_hpc.runs import Run

    run = Run(run_id)
    if not following:
        text = run.logs(which, tail=tail)
        if as_json:
            emit({"id": run.id, "which": which, "text": text, "paths": {k: str(v) for k, v in run.log_paths.items()}})
        else:
            click.echo(text, nl=False)
            if not text:
                others = ", ".join(name for name in run.log_paths if name != which) or "none yet"
                click.echo(f"(nothing in log {which!r}; other logs, for --which: {others})", err=True)
        return 0
    lines = _JsonLines()
    try:
        follow(run, log=which, tail=tail, out=lines.write if as_json else to_stdout)
    except KeyboardInterrupt:
        return 130
    if as_json:
        lines.end()
        emit(run.status().to_json())
    return 0


class _JsonLines:
    """Whole lines as {"line": ...}; at the end also one that lacks its newline."""

    def __init__(self) -> None:
        self._rest = b""

    def write(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            emit({"line": line.decode("utf-8", "replace")})

    def end(self) -> None:
        if self._rest:
            self.write(b"\n")
