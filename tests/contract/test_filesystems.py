"""Gateway and workers on nodes whose filesystem shows each other's changes late, refuses, and forgets.

Everything is real: a mounted filesystem for each node (nodes.py, lagging_fs.py), a gateway, workers, the SDK. What the
loop is told and the state it saves are compared, to the bit, with a run on a plain folder that nothing happened to.

    TINKER_HPC_TEST_LAG_S=30 TINKER_HPC_TEST_FULL_S=60 pytest tests/contract/test_filesystems.py -s    the long form
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nodes
import psutil
import pytest
import serving
import test_replay

from tinker_hpc.log import LogReader, ResultReader
from tinker_hpc.private_files import read_json, write_json
from tinker_hpc.run_folder import RunFolder, WorkerFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LAG_S = float(os.environ.get("TINKER_HPC_TEST_LAG_S", "3"))
FULL_S = float(os.environ.get("TINKER_HPC_TEST_FULL_S", "8"))
PATIENCE_S = 120.0 + 20 * LAG_S
OF_LOGS = ["*/requests", "*/requests/*", "*/results", "*/results/*", "*/lease", "*/lease/*"]


@dataclass
class Scene:
    """One loop with its gateway on a login node and its worker on another, and one more node for a second worker."""

    login: nodes.Node
    first: nodes.Node
    second: nodes.Node
    run: RunFolder
    worker: WorkerFolder
    service: serving.Service
    loop: serving.Processes
    control: Path

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        process = self.loop.running["loop"]

        def looked() -> Any:
            assert process.poll() in (None, 0), self.loop.log("loop")[-4000:]
            return condition()

        serving.wait_for(looked, PATIENCE_S, what)

    def step(self, number: int, *, until: Callable[[], Any] | None = None) -> None:
        """Let the loop take this step, and wait until it is done, or for something else."""
        self.wait((self.control / f"at-{number}").exists, f"the loop at {number}")
        (self.control / f"go-{number}").touch()
        self.wait(until or (self.control / f"at-{number + 1}").exists, f"step {number}")

    def say(self, node: nodes.Node, process: str, words: str) -> Callable[[], bool]:
        """Whether it has said so since now."""
        before = node.processes.log(process).count(words)
        return lambda: node.processes.log(process).count(words) > before


@pytest.fixture
def scene(tmp_path: Path, calm_run: serving.CalmRun) -> Iterator[Scene]:
    control = tmp_path / "control"
    control.mkdir()
    names = ("login", "first", "second")
    with (
        nodes.nodes(tmp_path, tmp_path / "root", *names, lag_s=LAG_S) as (login, first, second),
        serving.processes_in(tmp_path) as loop,
    ):
        run, worker = serving.new_run(tmp_path / "root")
        write_json(worker.declaration, read_json(worker.declaration) | {"snapshot_interval_s": 0})
        service = serving.start_gateway(login.processes, run)
        serving.start_worker(first.processes, worker)
        env = {"TINKER_BASE_URL": service.base_url, "TINKER_API_KEY": service.api_key}
        asked = {"steps": calm_run.steps, "sample": True, "control": str(control)}
        loop.start("loop", test_replay.PROGRAM, service.base_model, json.dumps(asked), env=env)
        yield Scene(login, first, second, run, worker, service, loop, control)


def test_a_run_on_such_filesystems_is_the_same_to_the_bit(scene: Scene, calm_run: serving.CalmRun) -> None:
    assert calm_run.steps == 5
    login, first, second = scene.login, scene.first, scene.second
    took_s: dict[str, float] = {}

    def timed(what: str, action: Callable[[], None]) -> None:
        started = time.monotonic()
        action()
        took_s[what] = time.monotonic() - started

    timed("only late", lambda: scene.step(0))

    def full() -> None:
        """Nothing is accepted, and nothing fails: the loop goes on when there is room."""
        for node in (login, first):
            node.fails({"error": "ENOSPC"})
        started = time.monotonic()
        refused = scene.service.post("create_session", {})
        assert refused.status == 503 and "No space left on device" in refused.json["error"]
        scene.step(1, until=lambda: time.monotonic() - started > FULL_S)
        assert not (scene.control / "at-2").exists()
        for node in (login, first):
            node.fails()
        scene.wait((scene.control / "at-2").exists, "step 1")

    timed(f"full for {FULL_S:.0f} s", full)

    def refused_to_the_worker() -> None:
        """Its results wait: over quota, then the filesystem turns read-only."""
        for error, words in (("EDQUOT", "Disk quota exceeded"), ("EROFS", "Read-only file system")):
            first.fails({"error": error})
            said = scene.say(first, "worker", words)
            if error == "EDQUOT":
                scene.step(2, until=said)
            else:
                scene.wait(said, words)  # within the minute in which the same is not said twice
            assert not (scene.control / "at-3").exists()
        first.fails()
        scene.wait((scene.control / "at-3").exists, "step 2")

    timed("over quota, then read-only", refused_to_the_worker)

    def broken() -> None:
        """I/O errors wherever the logs, the lease and the snapshots are."""
        said = scene.say(first, "worker", "Input/output error")
        heard = scene.say(login, "gateway", "Input/output error")
        snapshot = scene.say(first, "worker", "could not be written")
        first.fails({"error": "EIO", "paths": ["*/snapshots/*"]})
        scene.step(3, until=snapshot)
        for node in (login, first):
            node.fails({"error": "EIO", "operations": ["readdir", "open", "read", "create"], "paths": OF_LOGS})
        scene.wait(lambda: said() and heard(), "the words of both")
        for node in (login, first):
            node.fails()
        scene.wait((scene.control / "at-4").exists, "step 3")

    timed("I/O errors", broken)

    def split() -> None:
        """A second worker takes over while the first stands still, which then goes on as if it were alone. Meanwhile
        a purge took part of the newest snapshot.
        """
        scene.wait(lambda: len(list(scene.worker.snapshots.glob("0*"))) >= 2, "two snapshots")
        losing = first.processes.running["worker"]
        stopped = [psutil.Process(losing.pid), *psutil.Process(losing.pid).children(recursive=True)]
        for process in stopped:
            process.suspend()
        shutil.rmtree(max(scene.worker.snapshots.glob("0*")) / "adapters")
        serving.start_worker(second.processes, scene.worker)
        started = lambda: [r for r in ResultReader(scene.worker.path).poll() if r.header["op"] == "worker_started"]  # noqa: E731
        scene.wait(lambda: len(started()) == 2, "the second worker")
        for process in stopped:
            process.resume()
        scene.wait(lambda: losing.poll() is not None, "the loser's end")
        scene.step(4)

    timed("two workers", split)

    def save() -> None:
        """The last act of the loop meets a full disk."""
        second.fails({"error": "ENOSPC"})
        loop = scene.loop.running["loop"]
        scene.step(5, until=scene.say(second, "worker", "the disk refuses"))
        second.fails()
        scene.wait(lambda: loop.poll() is not None, "the end")

    timed("full while it saves", save)
    print(json.dumps({"lag_s": LAG_S, "took_s": {what: round(s, 1) for what, s in took_s.items()}}))

    printed = [json.loads(line) for line in scene.loop.log("loop").splitlines() if line.startswith("{")]
    assert test_replay.numbers(printed) == calm_run.numbers, "every number and token"
    assert test_replay.state_of(scene.service, printed) == calm_run.state, "every bit of adapter and optimizer"
    assert len(LogReader(scene.worker.requests).poll()) == calm_run.num_requests, "nothing was asked twice"
    answered = [r.header["seq"] for r in ResultReader(scene.worker.path).poll() if "ok" in r.header]
    assert sorted(answered) == list(range(1, calm_run.num_requests + 1)), "each once"
    assert "This worker stops writing results and ends" in first.processes.log("worker")
    taken_over = second.processes.log("worker")
    assert "cannot be read: No such file or directory" in taken_over, "what the purge took is passed over, with words"


SPLIT = str(serving.HERE / "split_lease.py")


def test_two_workers_that_both_believe_they_own_the_lease(tmp_path: Path) -> None:
    """The loser publishes what it had checked a moment before; no reader, however late it sees things, takes that."""
    folder = tmp_path / "root" / "workers" / "0"
    names = ("reader", "loser", "winner")
    with nodes.nodes(tmp_path, tmp_path / "root", *names, lag_s=LAG_S) as (reader, loser, winner):
        view = reader.view / "workers" / "0"

        def said(node: nodes.Node, words: str) -> None:
            serving.wait_for(lambda: words in node.processes.log("part"), PATIENCE_S, f"{node.name}: {words}")

        def tell(node: nodes.Node) -> None:
            (node.view.parent / "go").touch()

        for node, words in ((loser, "published a"), (reader, "took a"), (winner, "ready")):
            node.processes.start("part", SPLIT, node.name, str(folder), str(node.view.parent / "go"))
            said(node, words)
        # The reader looks all the time: it has just looked anew when it sees this one.
        (folder / "lease" / "anew").touch()
        serving.wait_for(lambda: "anew" in os.listdir(view / "lease"), PATIENCE_S, "the reader's next look")
        listed = os.listdir(view / "lease")
        tell(winner)
        said(winner, "published b")
        assert "fence-00000002" in os.listdir(folder / "lease") and os.listdir(view / "lease") == listed, "it is late"
        tell(loser)
        said(loser, "published late")
        said(loser, "This worker stops writing results and ends")
        said(reader, "took b")
        # Whatever the reader knew of the folders is forgotten by now: it sees the loser's record, and leaves it.
        time.sleep(LAG_S)
        tell(reader)
        said(reader, "read all")
        took = [line for line in reader.processes.log("part").splitlines() if line.startswith("took")]
        assert took == ["took a", "took b"]
