"""When snapshots are taken, what they hold, and which may be started from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tinker_hpc.log import Record
from tinker_hpc.private_files import make_private, read_json
from tinker_hpc.worker import snapshot_files
from tinker_hpc.worker.redo import Redo
from tinker_hpc.worker.snapshot_clock import FIRST_S, LONGEST_S, interval_s, is_due
from tinker_hpc.worker.snapshot_files import Coverage, Snapshot, SnapshotRefusedError


def test_the_interval_is_daly_s_within_limits() -> None:
    assert interval_s(None, None) == FIRST_S
    assert interval_s(0.001, 0.01) == FIRST_S, "cheap ones are not taken all the time"
    assert interval_s(3.0, 3.0) == pytest.approx(360, rel=0.01), "six minutes for an 8B state, as Young says"
    assert interval_s(25.0, 25.0) == LONGEST_S and 25.0 / LONGEST_S < 0.03, "one in a hundred would be 42 minutes"
    assert interval_s(0.1, 20.0) == 200.0, "a slow filesystem is not kept busy more than a tenth of the time"


def test_due_when_something_changed_and_rather_between_steps() -> None:
    assert not is_due(1e9, 30.0, changed=False, pending_gradients=False)
    assert is_due(24.0, 30.0, changed=True, pending_gradients=False)
    assert not is_due(29.0, 30.0, changed=True, pending_gradients=True)
    assert is_due(30.0, 30.0, changed=True, pending_gradients=True)


def test_one_is_on_the_disk_before_the_interval_is_over() -> None:
    """Batches of 4 s, a second to write: what a restart would redo at any time, simulated."""
    last, now, worst = 0.0, 0.0, 0.0
    while now < 1000.0:
        if is_due(now - last, 30.0, changed=True, pending_gradients=True, lead_s=4.0 + 1.0):
            worst = max(worst, now + 1.0 - last)
            last = now
        now += 4.0
    assert 24.0 < worst <= 30.0


def test_coverage_and_what_it_spares() -> None:
    held = Coverage(7, frozenset({5}))
    assert [seq in held for seq in (1, 5, 7, 8)] == [True, False, True, False]
    redo = Redo(held=held)
    redo.learn(Record({"op": "optim_step", "seq": seq, "ok": True}) for seq in (4, 5, 9))
    runs = [redo.must_run(Record({"op": "optim_step", "seq": seq})) for seq in (4, 5, 9, 10)]
    assert runs == [False, True, True, True]


def snapshot(**changes: Any) -> Snapshot:
    fields: dict[str, Any] = {
        "position": 9, "open": [8], "fence": 2, "num_results": 5, "base_model": "m", "layout": {}, "state": {},
        "adapters": {}, "samplers": {}, "created_at": 0.0,
    }  # fmt: skip
    return Snapshot(**(fields | changes))


def made(root: Path, name: str, **changes: Any) -> tuple[str, Snapshot]:
    """A snapshot with one file, published."""
    temporary = make_private(make_private(root) / f".writing-{name}")
    (temporary / "x.bin").write_bytes(name.encode())
    files = {f"{name}/{file}": digest for file, digest in snapshot_files.checksums(temporary, temporary).items()}
    content = snapshot(files=files, **changes)
    snapshot_files.publish(temporary, root / name, content)
    return name, content


def test_read_checks_everything(tmp_path: Path) -> None:
    name, content = made(tmp_path, "00000002-000001")
    path, good = tmp_path / name, {"base_model": "m", "counted": {2: 5}}
    assert snapshot_files.read(path, **good) == content
    assert json.loads((path / "snapshot.json").read_text())["open"] == [8]

    def refused(**changes: Any) -> str:
        with pytest.raises(SnapshotRefusedError) as refusal:
            snapshot_files.read(path, **(good | changes))
        return str(refusal.value)

    assert "of base model m, this worker serves n" in refused(base_model="n")
    assert "after that lease was lost (5 of its results are in it, 4 count)" in refused(counted={2: 4})
    assert "after that lease was lost" in refused(counted={})
    assert "request 9, which is in it, was taken back" in refused(void=[8, 9, 10])
    assert snapshot_files.read(path, **good, void=[8, 10]), "neither is in it"
    (path / "x.bin").write_bytes(name[::-1].encode())
    assert f"{path / 'x.bin'} fails its checksum" in refused()
    (path / "x.bin").unlink()
    assert "cannot be read: No such file" in refused()
    (path / "snapshot.json").write_bytes(b"{")
    assert "cannot be read" in refused()
    (path / "snapshot.json").unlink()
    assert "snapshot.json is missing" in refused()


def test_the_two_newest_stay_with_the_samplers_they_share(tmp_path: Path) -> None:
    for sampler in ("s1", "s2", "s3"):
        make_private(make_private(tmp_path / "samplers") / sampler)
    for number in (1, 2):
        made(tmp_path, f"00000001-{number:06d}")
    kept = [
        made(tmp_path, "00000001-000003", position=3, open=[2], samplers={"a": "samplers/s2"}),
        made(tmp_path, "00000002-000001", position=7, samplers={"a": "samplers/s2", "b": "samplers/s3"}),
    ]
    make_private(tmp_path / ".writing-00000001-000009")
    snapshot_files.prune(tmp_path, kept)
    assert snapshot_files.names(tmp_path) == ["00000001-000003", "00000002-000001"]
    assert sorted(path.name for path in (tmp_path / "samplers").iterdir()) == ["s2", "s3"]
    assert not list(tmp_path.glob(".writing-*"))
    assert read_json(tmp_path / "needed.json") == {"position": 3, "open": [2]}, "what the older one leaves to redo"
    snapshot_files.prune(tmp_path, kept[-1:])
    assert snapshot_files.names(tmp_path) == ["00000002-000001"]
    assert read_json(tmp_path / "needed.json")["position"] == 3, "one alone may be damaged: nothing more may go"
