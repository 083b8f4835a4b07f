"""`tinker-hpc`: one file per command family, imported when its command is used.

Exit codes: 0; 1 a run failed, or the machinery did; 2 the user's mistake; 130 Ctrl-C. `run` ends as its loop ended.
"""

from __future__ import annotations

import difflib
import json
import sys
from importlib import import_module
from typing import Any

import click

from tinker_hpc.errors import (
    ConfigError,
    DataRootError,
    SerializationError,
    SubmissionError,
    TinkerHpcError,
    UnknownRunError,
)

# Command -> (module, help line). The line is here so that --help imports none of them (a test compares it with theirs).
COMMANDS = {
    "run": ("running", "Run a Tinker program in a job that serves its base model."),
    "serve": ("serving", "Serve a base model to programs on this machine, until interrupted."),
    "ls": ("states", "List runs and sessions, newest first."),
    "status": ("states", "Show how one run is doing."),
    "logs": ("logs", "Print a run's output; -f follows it."),
    "metrics": ("numbers", "Print the numbers of each optimizer step."),
    "plot": ("numbers", "Draw a run's metrics as a PNG."),
    "cancel": ("ending", "End runs or sessions and everything they started."),
    "resume": ("ending", "Go on with a run that ended, also elsewhere or with other sizes."),
    "checkpoints": ("saved", "List saved states and sampler weights."),
    "export": ("saved", "Copy a checkpoint out as a PEFT adapter, or merged into its base model."),
    "plan": ("planning", "Say which layout a model would get and whether it fits."),
    "usage": ("usage", "Sum up GPU-hours by cluster."),
}


# What the user can put right: arguments, configuration, permissions, and what Slurm refuses to submit.
_MISTAKES = (ConfigError, DataRootError, SerializationError, SubmissionError, UnknownRunError)


class LazyGroup(click.Group):
    """A group that knows its commands' names and help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return getattr(import_module(f"tinker_hpc.cli.{COMMANDS[cmd_name][0]}"), cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in COMMANDS:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"No such command {args[0]!r}.{meant} `tinker-hpc --help` lists them.")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="tinker_hpc", prog_name="tinker-hpc")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Tinker on the Slurm cluster you already have."""


def main(argv: list[str] | None = None) -> None:
    """Command line entry: runs a command and turns its error into one message and an exit code."""
    argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    # Ours only before `--`: what follows belongs to the user's program.
    ours = argv[: argv.index("--")] if "--" in argv else argv
    try:
        code = cli.main(argv, prog_name="tinker-hpc", standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as error:
        _report(error.format_message(), type(error).__name__, as_json="--json" in ours, usage=_usage(error))
        code = 2
    except TinkerHpcError as error:
        if "--debug" in ours:
            raise
        _report(str(error), type(error).__name__, as_json="--json" in ours)
        code = 2 if isinstance(error, _MISTAKES) else 1
    except BrokenPipeError:  # `tinker-hpc logs ID | head`
        sys.stderr.close()
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.get_usage()}\n" if context is not None else ""


def _report(message: str, kind: str, *, as_json: bool, usage: str = "") -> None:
    if as_json:
        click.echo(json.dumps({"error": message, "type": kind}))
    click.echo(f"{usage}tinker-hpc: {message}", err=True)
