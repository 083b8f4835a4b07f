"""`resume`: a run that ended goes on, on the same cluster or another, with the same sizes or others.

Nothing is copied: the run folder holds the logs, the loop and the checkpoints. The worker loads what it needs of them
in whatever layout it has now, and the loop runs from its beginning and is handed what it was answered before.
"""

from __future__ import annotations

import os
from dataclasses import asdict, fields, replace

from launch import attempts, lineage
from launch.cancel import cancel
from launch.further_workers import cancel_worker_runs
from launch.job_spec import JobSpec
from launch.submit import submit as submit_job
from tinker_hpc.base_models import resolve
from tinker_hpc.config import Config, load_config, parse_time_limit_min
from tinker_hpc.errors import ConfigError, SlurmUnavailableError, SubmissionError
from tinker_hpc.private_files import make_private, read_json, write_json
from tinker_hpc.resources import Resources, build_job_spec, driver_profile
from tinker_hpc.run_folder import RunFolder
from tinker_hpc.runs import Run


def resume(
    run_id: str, *, cluster: str | None = None, resources: Resources | None = None, config: Config | None = None
) -> Run:
    """Submit the next job of a run that ended: cancelled, failed, or given up on.

    Args:
        cluster: another profile. The layout is planned for its GPUs, but for sizes that were given by hand. None: the
            run's own, as it was when it was submitted.
        resources: sizes that differ from the run's; None where they stay.
    Raises:
        ConfigError: the run is not over, or has succeeded; or it does not fit what is asked for now.
        UnknownRunError, SubmissionError, SlurmUnavailableError.
    """
    config = config or load_config()
    run = Run(run_id, config=config)
    status = run.status()
    if not status.finished:
        raise ConfigError(
            f"run {run_id} is {status.state.value}{f' ({status.reason})' if status.reason else ''}, not over; "
            f"`tinker-hpc cancel {run_id}` ends it, then it can be resumed."
        )
    if status.state.ok:
        raise ConfigError(f"run {run_id} has ended well: there is nothing to resume. Submit it anew.")
    # The worker jobs first, as for a new run; those that still wait in the queue for the old run go.
    folders = [*run.folder.worker_runs(), run.folder]
    specs = [JobSpec.from_json(read_json(folder.spec) or {}) for folder in folders]
    specs = [resumed_spec(s, cluster=cluster, resources=resources or Resources(), config=config) for s in specs]
    try:
        for folder, spec in zip(folders, specs, strict=True):
            cancel(lineage.jobs_of(folder))
            put_end_aside(folder)
            attempts.start_afresh(folder)
            if spec.kind != "driver":
                declare_layout(folder, spec)
            submit_job(spec, folder, again=True)
    except (ConfigError, SubmissionError, SlurmUnavailableError) as error:
        if not getattr(error, "job_may_exist", False):  # the run has no job, so its workers need none
            cancel_worker_runs(run.folder)
        raise
    return Run(run_id, config=config)


def resumed_spec(spec: JobSpec, *, cluster: str | None, resources: Resources, config: Config) -> JobSpec:
    """The run's spec with what is asked for now; everything else as it was. Reads the base model's config."""
    profile = config.profile(cluster) if cluster is not None else spec.cluster
    if spec.kind == "driver":
        return replace(
            spec,
            time_limit_min=parse_time_limit_min(resources.time, default=spec.time_limit_min),
            cluster=spec.cluster if cluster is None else driver_profile(profile),
        )
    asked = {field.name: getattr(resources, field.name) for field in fields(Resources)}
    kept = {
        "nodes": spec.nodes,
        "gpus_per_node": spec.gpus_per_node,
        "ranks_per_node": None if asked["gpus_per_node"] is not None else spec.ranks_per_node,
        "cpus_per_node": None if cluster is not None else spec.cpus_per_node,
        "memory": None if cluster is not None else spec.memory,
        "time": spec.time_limit_min,
    }
    same_ranks = all(asked[name] is None for name in ("nodes", "gpus_per_node", "ranks_per_node"))
    same_gpus = same_ranks and cluster is None
    by_hand = {**(spec.sizes_by_hand if same_ranks else {}), **resources.sizes_by_hand}
    # On the same GPUs what was planned for them stays, for the same bits; for others it is planned as for a new run.
    kept |= {name: getattr(spec.layout, name) for name in ("tp_size", "pp_size", "ep_size")} if same_gpus else by_hand
    merged = Resources(**{name: kept.get(name) if value is None else value for name, value in asked.items()})
    fresh = build_job_spec(
        merged,
        profile=profile,
        base_model=resolve(spec.base_model, config.base_models),
        asked_base_model=spec.base_model,
        run_id=spec.run_id,
        kind=spec.kind,
        name=spec.name,
        command=spec.command,
        working_folder=spec.working_folder,
        environment=spec.environment,
        serves_run=spec.serves_run,
        per_expert=config.expert_lora == "per_expert",
    )
    layout = spec.layout if same_gpus and not resources.sizes_by_hand else fresh.layout
    return replace(fresh, base_model_folder=spec.base_model_folder, layout=layout, sizes_by_hand=by_hand)


def put_end_aside(folder: RunFolder) -> None:
    """Keep how the run ended under attempts/, so that it is not over any more. In this order a crash in between leaves
    a run that is over for the old reason, and can be resumed again."""
    number = attempts.holder(folder)
    make_private(folder.attempts)  # cancelled in the queue: no job of it has begun
    for path in (folder.result, folder.cancel, folder.outcome):
        if path.exists():
            os.replace(path, folder.attempts / f"before-{number:06d}-{path.name}")


def declare_layout(folder: RunFolder, spec: JobSpec) -> None:
    """worker.json with the layout from now on."""
    worker = folder.worker(0)
    declaration = read_json(worker.declaration) or {}
    write_json(worker.declaration, {**declaration, "layout": asdict(spec.layout)})
