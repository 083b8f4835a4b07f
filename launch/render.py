"""A job spec as the text of its sbatch script (pure). `--dry-run` prints it, submit.py sends it.

The text itself is in slurm_templates/, one readable file per shape of job; here are only its values, quoted.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import jinja2

from launch.job_spec import JobSpec

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("slurm_templates", package_path=""),
    undefined=jinja2.StrictUndefined,  # a value forgotten below is an error, not an empty word in a script
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
)


def template_name(spec: JobSpec) -> str:
    """Which file of slurm_templates/ a job is made from."""
    if spec.gpus_per_node == 0:
        return "cpu.sbatch.j2"
    return "one_node_gpu.sbatch.j2" if spec.nodes == 1 else "multi_node_gpu.sbatch.j2"


def sbatch_text(spec: JobSpec, command: str, log_folder: Path, *, requeue: bool = False) -> str:
    """The whole script.

    Args:
        spec: what to ask for.
        command: a shell command, already quoted; srun starts it once per node.
        log_folder: the run's `slurm/` folder; must exist on the shared filesystem when the job starts.
        requeue: whether Slurm may put the job into the queue again (site.py).
    """
    profile = spec.cluster
    return _TEMPLATES.get_template(template_name(spec)).render(
        run_id=spec.run_id,
        base_model=_one_line(spec.base_model),
        partition=_option(profile.partition),
        account=_option(profile.account),
        qos=_option(profile.qos),
        constraint=_option(profile.constraint),
        nodes=spec.nodes,
        cpus_per_node=spec.cpus_per_node,
        gres=gres(spec),
        memory=_option(spec.memory_per_node),
        time_limit=time_limit_text(spec.time_limit_min),
        job_log=_log_path(log_folder, "%j.log"),
        task_stdout=_log_path(log_folder, "%j_%t_log.out"),
        task_stderr=_log_path(log_folder, "%j_%t_log.err"),
        extra=[_one_line(line) for line in profile.extra],
        variables=[(name, shlex.quote(value)) for name, value in sorted(spec.variables.items())],
        setup=profile.setup,
        command=command,
        requeue=requeue,
    )


def supervisor_command(spec: JobSpec, slurm_folder: Path) -> str:
    """What srun starts on each node: submitit's own entry point, which unpickles and calls the supervisor."""
    return f"{python_of(spec)} -u -m submitit.core._submit {shlex.quote(str(slurm_folder))}"


def preview(spec: JobSpec, run_folder: Path) -> str:
    """The script `submit` would send for a run in that folder, without touching anything: `--dry-run`."""
    slurm_folder = run_folder / "slurm"
    return sbatch_text(spec, supervisor_command(spec, slurm_folder), slurm_folder)


def python_of(spec: JobSpec) -> str:
    """The interpreter on the nodes, for a shell: the profile's, else the one running now (homes are shared).

    -P: a queue.py or torch.py in the folder the user works in must not take the place of the module of that name.
    """
    return f"{shlex.quote(spec.cluster.python or sys.executable)} -P"


def gres(spec: JobSpec) -> str:
    """Value of --gres: `gpu:4` or `gpu:a100:4`; empty for a CPU job."""
    if spec.gpus_per_node == 0:
        return ""
    kind = f"{spec.cluster.gpu_type}:" if spec.cluster.gpu_type else ""
    return f"gpu:{kind}{spec.gpus_per_node}"


def time_limit_text(minutes: int) -> str:
    """Slurm's spelling of a time limit: `00:30:00`, `1-12:00:00`."""
    days, rest = divmod(minutes, 24 * 60)
    clock = f"{rest // 60:02d}:{rest % 60:02d}:00"
    return f"{days}-{clock}" if days else clock


def _log_path(folder: Path, name: str) -> str:
    """A log path for Slurm, which replaces %j and %t in it; a % of the folder's own is doubled to survive."""
    return shlex.quote(_one_line(str(folder).replace("%", "%%")) + "/" + name)


def _option(value: str | None) -> str | None:
    """A value on an #SBATCH line. sbatch splits these lines as a shell does, so odd characters need quotes."""
    return None if value is None else shlex.quote(_one_line(value))


def _one_line(text: str) -> str:
    """A line break in a value would start a line of its own in the script."""
    return " ".join(text.split("\n"))
