"""`run`: any Tinker program, unmodified, beside a worker in one job."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click

from tinker_hpc.cli.options import job_options, json_option
from tinker_hpc.cli.output import emit
from tinker_hpc.errors import ConfigError, JobFailedError, LoopFailedError
from tinker_hpc.resources import Resources


@click.command()
@job_options
@click.option(
    "--driver",
    type=click.Choice(["together", "separate"]),
    default="together",
    help="separate: the loop in a small CPU job of its own, beside a worker that may be preempted.",
)
@click.option("--dry-run", is_flag=True, help="Print the sbatch script and submit nothing.")
@click.option("--detach", is_flag=True, help="Return as soon as the job is submitted.")
@json_option
@click.argument("command", nargs=-1, required=True, metavar="-- CMD...")
def run(
    *,
    base_models: tuple[str, ...],
    cluster: str | None,
    name: str | None,
    resources: Resources,
    driver: Literal["together", "separate"],
    dry_run: bool,
    detach: bool,
    as_json: bool,
    command: tuple[str, ...],
) -> int:
    """Run a Tinker program in a job that serves its base model.

    The program sees TINKER_BASE_URL and TINKER_API_KEY and needs no change. Its output is followed here and its exit
    code is ours; Ctrl-C leaves the run going.
    """
    from tinker_hpc.cli.follow import follow, to_stderr, to_stdout
    from tinker_hpc.resources import check_run_name
    from tinker_hpc.submission import submit_loop

    program = next((word for word in command if word.endswith(".py")), command[0])
    name = check_run_name(name, otherwise=program.removesuffix(".py"))
    if dry_run:
        _print_script(base_models, cluster, resources, name, command, driver=driver, as_json=as_json)
        return 0
    check_program(command, Path.cwd())
    submitted = submit_loop(
        base_models=base_models, cluster=cluster, resources=resources, name=name, command=command, driver=driver
    )
    first = {"id": submitted.id, "job_id": submitted.status().job_id, "folder": str(submitted.folder.path)}
    if as_json:
        emit(first)
    elif detach:
        click.echo(submitted.id)
    if detach:
        return 0
    try:
        follow(submitted, out=to_stderr if as_json else to_stdout)
    except KeyboardInterrupt:
        click.echo(f"\n{submitted.id} goes on. See it: tinker-hpc logs -f {submitted.id}", err=True)
        click.echo(f"End it: tinker-hpc cancel {submitted.id}", err=True)
        return 130
    code = 0
    try:
        submitted.result()
    except LoopFailedError as error:
        code = error.exit_code or 1
        click.echo(f"tinker-hpc: the program ended with exit code {code}. Log: {error.log_paths[0]}", err=True)
    except JobFailedError as error:
        code = 1
        click.echo(f"tinker-hpc: {error}", err=True)
    if as_json:
        emit(submitted.status().to_json())
    return code


def check_program(command: Sequence[str], folder: Path) -> None:
    """Refuse `python FILE` without that file: known now, it would be known again after a day in the queue.

    Raises: ConfigError.
    """
    if not Path(command[0]).name.startswith("python"):
        return
    program = next((word for word in command[1:] if not word.startswith("-")), "")
    if program.endswith(".py") and not (folder / program).is_file():
        raise ConfigError(f"no file {program} in {folder}, where the program starts. Check its name, or cd first.")


def _print_script(
    base_models: tuple[str, ...],
    cluster: str | None,
    resources: Resources,
    name: str,
    command: tuple[str, ...],
    *,
    driver: Literal["together", "separate"],
    as_json: bool,
) -> None:
    """The sbatch scripts of this run, one a base model, with a stand-in for its id; nothing is written."""
    from launch.render import preview
    from tinker_hpc.config import load_config
    from tinker_hpc.submission import job_specs

    config = load_config()
    run_id = f"{name}-{time.strftime('%Y%m%d')}-000000"
    profile = config.profile(cluster)
    specs = job_specs(
        base_models,
        profile=profile,
        config=config,
        resources=resources,
        run_id=run_id,
        name=name,
        command=command,
        driver=driver,
        weights=False,
    )
    for spec in specs:
        script = preview(spec, config.data_root / "runs" / spec.run_id)
        if as_json:
            emit({"script": script, "spec": spec.to_json()})
        else:
            click.echo(script, nl=not script.endswith("\n"))
    if profile.executor == "local" and not as_json:
        click.echo(f"(cluster {profile.name} is this machine: the job runs as a process, not by this script)", err=True)
