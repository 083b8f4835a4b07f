"""SIGKILL of each kind of process at each point of a request: nothing is lost, nothing done twice, every bit the same.

Where a process is when it is killed is arranged from outside: by stopping another one (SIGSTOP) and looking at the
logs, never by a hook in the product. All of them at once, as when a job is killed, is run by hand (`make slurm-long`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import serving
from safetensors.numpy import load_file

from tinker_hpc.log import LogReader, Record, ResultReader
from tinker_hpc.private_files import read_json, write_json
from tinker_hpc.run_folder import RunFolder, WorkerFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROGRAM = str(serving.HERE / "stepwise_program.py")
KINDS = ("rank", "agent", "gateway", "loop", pytest.param("job", marks=pytest.mark.by_hand))
POINTS = ("before accept", "after accept", "mid pass", "before the step", "mid snapshot", "mid publish")
PATIENCE_S = 240.0


@dataclass
class Scene:
    """One run with all its processes, and the recovered times."""

    run: RunFolder
    worker: WorkerFolder
    processes: serving.Processes
    control: Path
    service: serving.Service | None = None
    recovered_s: dict[str, float] = field(default_factory=dict)

    # ---- processes

    def start(self) -> None:
        self.control.mkdir()
        self.start_agent()
        self.service = serving.start_gateway(self.processes, self.run)
        write_json(self.worker.status, {"phase": "ready", "reason": "", "error": None, "since": time.time()})
        self.start_loop()

    def start_agent(self) -> None:
        argv = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "--max-restarts=9")
        env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as launch/children.py
        module = ("--module", "tinker_hpc.worker", "--worker-dir", str(self.worker.path))
        self.processes.start("agent", *argv, *module, env=env)

    def start_loop(self) -> None:
        assert self.service is not None
        self.run.begin_loop()
        env = {"TINKER_BASE_URL": self.service.base_url, "TINKER_API_KEY": self.service.api_key}
        argv = (PROGRAM, self.service.base_model, str(self.control), str(len(POINTS)))
        self.processes.start("loop", *argv, env=env)

    def rank(self) -> int:
        """Its pid; the agent may be starting it just now."""
        agent = self.processes.running["agent"].pid
        return int(self.wait(lambda: Path(f"/proc/{agent}/task/{agent}/children").read_text().split(), "a rank")[0])

    def kill(self, kind: str) -> None:
        """SIGKILL, and what the run's supervisor does about it. A rank is its agent's to replace."""
        if kind == "rank":
            os.kill(self.rank(), signal.SIGKILL)
            return
        if kind == "job":
            rank = self.rank()
            for each in ("loop", "gateway", "agent"):
                self.kill(each)
            with contextlib.suppress(ProcessLookupError):  # it ends with its agent
                os.kill(rank, signal.SIGKILL)
            return
        process = self.processes.running.pop(kind)
        process.kill()
        process.wait()

    def revive(self, kind: str) -> None:
        if kind in ("agent", "job"):
            self.start_agent()
        if kind in ("gateway", "job"):
            self.service = serving.start_gateway(self.processes, self.run)
        if kind in ("loop", "job"):
            self.start_loop()

    @contextlib.contextmanager
    def stopped(self, pid: int) -> Iterator[None]:
        """Held where it is. It may be killed meanwhile."""
        os.kill(pid, signal.SIGSTOP)
        self.wait(lambda: state(pid) == "T", "the stop")
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    # ---- what can be seen from outside

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            if time.monotonic() > deadline:
                logs = {name: self.processes.log(name)[-1500:] for name in (*self.processes.running, "agent")}
                raise AssertionError(f"{what} did not come within {PATIENCE_S} s: {logs}")
            time.sleep(0.001)
        return found

    def go(self, step: int, what: str) -> None:
        self.wait((self.control / f"at-{step}-{what}").exists, f"the loop at {step} {what}")
        (self.control / f"go-{step}-{what}").touch()

    def request(self, step: int, op: str = "forward_backward") -> int | None:
        """seq of the step-th request of that kind, once it is accepted."""
        found = [r.header["seq"] for r in records(LogReader(self.worker.requests)) if r.header["op"] == op]
        return found[step] if len(found) > step else None

    def results(self) -> list[Record]:
        return records(ResultReader(self.worker.path))

    def is_serving(self) -> bool:
        """Whether the rank there is has started to serve: one that outlived its agent may have answered last."""
        started = [r.header["pid"] for r in self.results() if r.header["op"] == "worker_started"]
        return bool(started) and started[-1] == self.rank()

    def is_batched(self, seq: int) -> bool:
        return any(r.header["op"] == "batch" and seq in r.header["seqs"] for r in self.results())

    def is_answered(self, seq: int) -> bool:
        return any("ok" in r.header and r.header["seq"] == seq for r in self.results())


def records(reader: Any) -> list[Record]:
    found = []
    while new := reader.poll():
        found += new
    return found


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# ---- the points


def before_accept(scene: Scene, step: int, kill: Callable[[], None]) -> None:
    """The loop has sent it, the gateway has not read it."""
    with scene.stopped(scene.processes.running["gateway"].pid):
        scene.go(step, "pass")
        time.sleep(0.3)
        assert scene.request(step) is None
        kill()


def after_accept(scene: Scene, step: int, kill: Callable[[], None]) -> None:
    """It is in the log, and the worker has not begun."""
    with scene.stopped(scene.rank()):
        scene.go(step, "pass")
        seq = scene.wait(lambda: scene.request(step), "the request")
        assert not scene.is_batched(seq)
        kill()


def mid_pass(scene: Scene, step: int, kill: Callable[[], None]) -> None:
    """The worker computes it."""
    rank = scene.rank()
    with before_everybody():
        scene.go(step, "pass")
        seq = scene.wait(lambda: scene.request(step), "the request")
        scene.wait(lambda: scene.is_batched(seq), "the batch")
        os.kill(rank, signal.SIGSTOP)
    with scene.stopped(rank):
        assert not scene.is_answered(seq), "the pass is too short for this test"
        kill()


@contextlib.contextmanager
def before_everybody() -> Iterator[None]:
    """This process runs whenever it wants to, however busy the machine: it stops another within some milliseconds, and
    that is less than a pass takes. Where it may not ask for that, a pass is still long beside what a scheduler takes.
    """
    policy = os.sched_getscheduler(0)
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, os.sched_param(0))


def before_the_step(scene: Scene, step: int, kill: Callable[[], None]) -> None:
    """Gradients are there, the optimizer has not stepped."""
    scene.go(step, "pass")
    scene.wait((scene.control / f"at-{step}-step").exists, "the result")
    assert scene.is_answered(scene.request(step) or 0)
    kill()


def mid_snapshot(scene: Scene, step: int, kill: Callable[[], None]) -> None:
    """A snapshot is half written."""
    scene.go(step, "pass")
    writing = lambda: list(scene.worker.snapshots.glob(".writing-*"))  # noqa: E731
    while True:
        scene.wait(writing, "a snapshot")
        with scene.stopped(scene.rank()):
            if writing():
                kill()
                return


def mid_publish(scene: Scene, step: int, kill: Callable[[], None]) -> None:
    """The result is computed and not durable: the disk is full."""
    filler = scene.run.data_root / "filler"
    # A snapshot that fails would give back the room it had taken, and the result would fit.
    scene.wait(lambda: not list(scene.worker.snapshots.glob(".writing-*")), "the last snapshot's end")
    with scene.stopped(scene.rank()):
        scene.go(step, "pass")
        seq = scene.wait(lambda: scene.request(step), "the request")
        fill(filler)
    waiting = scene.processes.log("agent").count("results wait")
    scene.wait(lambda: scene.processes.log("agent").count("results wait") > waiting, "the full disk's complaint")
    assert not scene.is_answered(seq)
    kill()
    filler.unlink()


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC


ARRANGED = dict(
    zip(POINTS, (before_accept, after_accept, mid_pass, before_the_step, mid_snapshot, mid_publish), strict=True)
)


# ---- the test


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Callable[[str], Scene]]:
    with contextlib.ExitStack() as stack:

        def make(name: str) -> Scene:
            folder = tmp_path / name
            folder.mkdir()
            processes = stack.enter_context(serving.processes_in(folder))
            stack.enter_context(serving.small_disk(folder / "root", "64m"))
            run, worker = serving.new_run(folder / "root")
            declaration = read_json(worker.declaration)
            assert declaration is not None
            write_json(worker.declaration, declaration | {"snapshot_interval_s": 0})
            return Scene(run, worker, processes, folder / "control")

        yield make


def finish(scene: Scene) -> tuple[list[Any], dict[str, bytes]]:
    """What the loop was told, and the tensors of its last state."""
    loop = scene.processes.running["loop"]
    assert scene.wait(lambda: loop.poll() is not None, "the loop's end") and loop.poll() == 0, scene.processes.log(
        "loop"
    )
    said = json.loads((scene.control / "numbers.json").read_text())
    model_id, kind, name = said["path"].removeprefix("tinker://").split("/")
    folder = scene.run.data_root / "checkpoints" / model_id.replace(":", "_") / kind / name
    files = [load_file(folder / f"{part}.safetensors") for part in ("adapter_model", "optimizer")]
    tensors = {f"{i}{key}": values.tobytes() for i, found in enumerate(files) for key, values in found.items()}
    answered = [record.header["seq"] for record in scene.results() if "ok" in record.header]
    requests = records(LogReader(scene.worker.requests))
    assert sorted(answered) == [request.header["seq"] for request in requests], "each once"
    assert len(requests) == 2 * len(POINTS) + 2, "nothing was asked twice: create, passes and steps, save"
    return said["returned"], tensors


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_point(kind: str, scene: Callable[[str], Scene], expected: dict[str, Any]) -> None:
    if not expected:
        calm = scene("calm")
        calm.start()
        for step in range(len(POINTS)):
            calm.go(step, "pass"), calm.go(step, "step")
        expected["calm"] = finish(calm)
    shaken = scene(kind)
    shaken.start()
    for step, (point, arrange) in enumerate(ARRANGED.items()):
        shaken.wait(lambda step=step: (shaken.control / f"at-{step}-pass").exists(), f"step {step}")
        shaken.wait(shaken.is_serving, "the worker")
        arrange(shaken, step, lambda: shaken.kill(kind))
        killed_at = time.monotonic()
        shaken.revive(kind)
        shaken.go(step, "step")
        shaken.wait(lambda step=step: shaken.is_answered(shaken.request(step, "optim_step") or 0), "the step")
        shaken.recovered_s[point] = time.monotonic() - killed_at
    returned, tensors = finish(shaken)
    assert returned == expected["calm"][0], "every number"
    assert tensors == expected["calm"][1], "every bit of adapter and optimizer"
    cells = " | ".join(f"{seconds:.1f} s" for seconds in shaken.recovered_s.values())
    print(f"\n| killed | {' | '.join(POINTS)} |\n| {kind} | {cells} |")
