"""A worker that begins again has let go of what the one before it wrote into."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import MagicMock

from tinker_hpc.run_folder import WorkerFolder
from tinker_hpc.worker import serve


def test_snapshots_aside_are_closed_before_the_next_ones_open_the_folder(tmp_path: Path, monkeypatch) -> None:
    for name in ("Engine", "HangWatch", "TrainStep", "SampleStep", "SnapshotStep"):
        monkeypatch.setattr(serve, name, MagicMock())
    ranks = MagicMock(is_first=False)
    ranks.broadcast.return_value = []
    monkeypatch.setattr(serve, "Ranks", lambda *_, **__: ranks)
    events: list[str] = []

    def open_aside(*_: object) -> MagicMock:
        events.append("opened")
        aside = MagicMock()
        aside.close.side_effect = lambda: events.append("closed")
        return aside

    monkeypatch.setattr(serve, "SnapshotsAside", open_aside)
    loop = MagicMock()
    loop.run.side_effect = [True, True, False]
    monkeypatch.setattr(serve, "Loop", lambda *_, **__: loop)
    folder = WorkerFolder(tmp_path)
    folder.declaration.write_text(json.dumps({"base_model_folder": "base", "base_model": "base"}))
    serve.serve(folder, {}, MagicMock())
    assert events == ["opened", "closed"] * 3
