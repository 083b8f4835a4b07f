"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

from tinker_hpc.resources import Resources


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--json`, as the keyword `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(command)


def size_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The sizes of a job, as one keyword, `resources`."""
    cpus = click.option("--cpus-per-node", type=int, metavar="N", help="CPU cores of each node (the profile's).")
    time = click.option("--time", metavar="LIMIT", help="Time limit of each job: minutes, or 8:00:00 (the profile's).")
    return _with_resources(command, *_machine_options(), cpus, time, *_layout_options())


def plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The sizes that a plan depends on, by the same names and as the same keyword; --gpus is its short name."""
    return _with_resources(command, *_machine_options("--gpus"), *_layout_options())


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a job needs: `base_models`, `cluster`, `name`, and its sizes as one keyword, `resources`."""
    return _with_options(
        size_options(command),
        click.option(
            "--base-model",
            "base_models",
            required=True,
            multiple=True,
            metavar="M",
            help="Hub name or folder of the model to serve; given again, a further one with a job of its own.",
        ),
        click.option("--cluster", metavar="C", help="Profile of the configuration; `local` is this machine."),
        click.option("--name", metavar="NAME", help="Start of the id."),
    )


def _machine_options(*names_of_gpus: str) -> tuple[Callable[..., Any], ...]:
    return (
        click.option("--nodes", type=int, metavar="N", help="Number of nodes (1)."),
        click.option(
            "--gpus-per-node",
            *names_of_gpus,
            "gpus_per_node",
            type=int,
            metavar="N",
            help="GPUs of each node; 0 is CPU only (the profile's).",
        ),
        click.option("--ranks-per-node", type=int, metavar="N", help="Worker processes per node (one per GPU)."),
        click.option("--memory", metavar="SIZE", help="Memory of each node, e.g. 64G (the profile's)."),
    )


def _layout_options() -> tuple[Callable[..., Any], ...]:
    return (
        click.option("--tp-size", type=int, metavar="N", help="Tensor parallel size (chosen from the model's size)."),
        click.option("--pp-size", type=int, metavar="N", help="Pipeline stages (chosen from the model's size)."),
        click.option("--ep-size", type=int, metavar="N", help="Ranks that share a layer's experts (chosen)."),
    )


def _with_resources(command: Callable[..., Any], *options: Callable[..., Any]) -> Callable[..., Any]:
    """Gathers what these options give into `resources`."""
    names = {field.name for field in fields(Resources)}

    @functools.wraps(command)
    def with_resources(*args: Any, **kwargs: Any) -> Any:
        resources = Resources(**{name: kwargs.pop(name) for name in names & kwargs.keys()})
        return command(*args, resources=resources, **kwargs)

    return _with_options(with_resources, *options)


def _with_options(command: Callable[..., Any], *options: Any) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command
