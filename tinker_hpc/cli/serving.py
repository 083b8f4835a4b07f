"""`serve`: a gateway on this machine and a worker as a job, until SIGINT or SIGTERM."""

from __future__ import annotations

import shlex
import signal
import threading

import click

from tinker_hpc.cli.options import job_options, json_option
from tinker_hpc.cli.output import emit
from tinker_hpc.errors import JobFailedError
from tinker_hpc.resources import Resources

_LOOK_S = 1.0


@click.command()
@job_options
@json_option
def serve(
    base_models: tuple[str, ...], cluster: str | None, name: str | None, resources: Resources, as_json: bool
) -> int:
    """Serve a base model to programs on this machine, until interrupted.

    Prints where as soon as the gateway answers; requests wait there while the job is in the queue. SIGINT and SIGTERM
    end the job and the gateway.
    """
    from tinker_hpc.cli.follow import Reporter
    from tinker_hpc.private_files import read_json
    from tinker_hpc.sessions import Session

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    with Session(cluster=cluster, resources=resources, name=name) as session:
        for base_model in base_models:
            session.serve(base_model)
        if as_json:
            emit({"session_id": session.id, "base_url": session.base_url, "api_key": session.api_key})
        else:
            click.echo(f"export TINKER_BASE_URL={session.base_url}\nexport TINKER_API_KEY={session.api_key}")
            if session.hub_cache is not None:
                click.echo(f"export HF_HUB_CACHE={shlex.quote(str(session.hub_cache))}")
        reporter = Reporter(session.id)
        said: dict[int, str] = {}
        ended = None
        while not stop.is_set() and ended is None:
            for index, base_model in enumerate(base_models):
                status = read_json(session.folder.worker(index).status) or {}
                line = " ".join(filter(None, [str(status.get("phase", "")), str(status.get("reason", ""))]))
                if line and line != said.get(index):
                    said[index] = line
                    which = f" of {base_model}" if len(base_models) > 1 else ""
                    reporter.say(f"worker{which} {line}", moving=status.get("phase") != "ready")
                if status.get("phase") == "ended":
                    ended = status.get("error") or status.get("reason") or "its job ended"
            stop.wait(_LOOK_S)
        reporter.stop()
    if ended is not None:
        raise JobFailedError(f"session {session.id} is over: {ended}")
    return 0
