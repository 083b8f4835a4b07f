"""Checkpoints by HTTP, without a worker: names cannot lead out, times are enforced, a restart changes nothing."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import serving

from tinker_hpc.private_files import read_json, write_json
from tinker_hpc.run_folder import checkpoint_folder

pytestmark = pytest.mark.slow

MODEL = "s-1:train:0"
WAIT_S = 60


def saved(service: serving.Service, name: str, *, kind: str = "weights", age_s: float = 0.0, ttl_s: int | None = None):
    """A checkpoint as a worker leaves it; its folder."""
    assert service.run is not None
    folder = checkpoint_folder(service.run.data_root, MODEL, kind, name)
    folder.mkdir(parents=True, mode=0o700)
    (folder / "adapter_config.json").write_text("{}")
    created_at = time.time() - age_s
    metadata = {
        "path": f"tinker://{MODEL}/{kind}/{name}",
        "base_model": service.base_model,
        "lora": {"rank": 4, "seed": 1, "train_mlp": True, "train_attn": True, "train_unembed": True},
        "optimizer": False,
        "created_at": created_at,
        "ttl_seconds": ttl_s,
        "files": {"adapter_config.json": {"bytes": 2, "sha256": ""}},
    }
    (folder / "checkpoint.json").write_text(json.dumps(metadata))
    return folder


def url(name: str, kind: str = "weights") -> str:
    return f"training_runs/{MODEL}/checkpoints/{kind}/{name}"


def listed(service: serving.Service) -> dict[str, dict]:
    found = service.get("checkpoints").json["checkpoints"]
    return {each["checkpoint_id"].partition("/")[2]: each for each in found}


def test_times_are_enforced_when_the_gateway_starts(alone, processes):
    assert alone.run is not None
    write_json(alone.run.reads, [f"tinker://{MODEL}/weights/needed"])  # this run goes on, and has read it
    kept = saved(alone, "kept")
    needed = saved(alone, "needed", age_s=8000, ttl_s=3600)
    assert set(listed(alone)) == {"kept"}, "what is over is not listed from that second on"
    refused = alone.post("weights_info", {"tinker_path": f"tinker://{MODEL}/weights/needed"})
    assert refused.status == 404 and "it expired at" in refused.json["error"]
    processes.stop("gateway")
    over = saved(alone, "over", age_s=8000, ttl_s=3600)  # not before: the first gateway may not have swept yet
    again = serving.start_gateway(processes, alone.run)
    serving.wait_for(lambda: not over.exists(), WAIT_S, "the sweep")
    assert kept.exists() and needed.exists() and set(listed(again)) == {"kept"}
    write_json(alone.run.outcome, {"state": "succeeded"})
    processes.stop("gateway")
    serving.start_gateway(processes, alone.run)
    serving.wait_for(lambda: not needed.exists(), WAIT_S, "the sweep")


def test_what_was_set_is_so_after_a_restart(alone, processes):
    assert alone.run is not None
    for name in ("timed", "deleted", "read"):
        saved(alone, name)
    session = alone.post("create_session", {"display_name": "kept"}).json["session_id"]
    ask = {"session_id": session, "sampling_session_seq_id": 0, "model_path": f"tinker://{MODEL}/weights/read"}
    assert alone.post("create_sampling_session", ask).status == 200
    assert read_json(alone.run.reads) == [f"tinker://{MODEL}/weights/read"], "noted before it was accepted"
    assert alone.http("PUT", f"/api/v1/{url('timed')}/ttl", {"ttl_seconds": 7200}).status == 204
    for name in ("deleted", "read"):
        assert alone.http("DELETE", f"/api/v1/{url(name)}").status == 204
        assert alone.http("DELETE", f"/api/v1/{url(name)}").status == 404
    assert alone.http("PUT", f"/api/v1/sessions/{session}/project", {"project_id": "p"}).status == 204
    copied = {"source_path": f"tinker://{MODEL}/weights/timed", "destination_project_id": "archive"}
    key = {"X-Idempotency-Key": "one"}
    copy = alone.post("copy_weights", copied, headers=key).json["tinker_path"]
    processes.stop("gateway", kill=True)
    again = serving.start_gateway(processes, alone.run)
    assert again.post("copy_weights", copied, headers=key).json["tinker_path"] == copy, "the same request, sent again"
    left = {each["tinker_path"]: each["expires_at"] for each in again.get("checkpoints").json["checkpoints"]}
    assert set(left) == {copied["source_path"], copy}
    assert left[copied["source_path"]] is not None and left[copy] is None, "a copy has a time of its own"
    (found,) = again.post("sessions/search", {"project_ids": ["p"]}).json["sessions"]
    assert found["session_id"] == session and found["display_name"] == "kept"
    assert not checkpoint_folder(alone.run.data_root, MODEL, "weights", "deleted").exists()
    assert checkpoint_folder(alone.run.data_root, MODEL, "weights", "read").exists(), "a worker may read it again"


@pytest.mark.parametrize(
    "path",
    [
        url(".."),
        url("..%2f..%2f..%2fsecret"),
        url("%2e%2e"),
        url(".hidden"),
        url("a%00b"),
        url("a", kind=".."),
        url("a", kind="optimizer"),
        "training_runs/..%2f..%2fsecret/checkpoints/weights/a",
        f"training_runs/{MODEL}/checkpoints/weights",
    ],
)
def test_names_cannot_lead_out(alone, path):
    assert alone.run is not None
    secret = alone.run.data_root / "secret"
    secret.mkdir()
    (secret / "checkpoint.json").write_text("{}")
    for method, end in (("DELETE", ""), ("PUT", "/ttl"), ("POST", "/publish"), ("GET", "/archive")):
        reply = alone.http(method, f"/api/v1/{path}{end}", {"ttl_seconds": None})
        assert reply.status in (400, 404, 405), (method, reply.body)
        assert len(reply.json["error"]) > 20
    assert (secret / "checkpoint.json").exists()


def test_links_are_given_for_the_files_alone(alone):
    folder = saved(alone, "out", kind="external_weights")
    answer = alone.get(f"{url('out', 'external_weights')}/external_weights_urls").json
    assert answer["urls"] == {"adapter_config.json": (folder / "adapter_config.json").as_uri()}
    saved(alone, "state")
    refused = alone.get(f"{url('state')}/external_weights_urls")
    assert refused.status == 400 and "save_weights_external(name)" in refused.json["error"]
    archive = alone.get(f"{url('state')}/archive").json["url"]
    file = Path(archive.removeprefix("file://"))
    assert file.stat().st_mode & 0o077 == 0 and file.parent.stat().st_mode & 0o077 == 0


def test_publishing_says_why_nobody_could_come(alone):
    assert alone.run is not None
    saved(alone, "a")
    os.chmod(alone.run.data_root.parent, 0o700)
    refused = alone.post(f"{url('a')}/publish")
    assert refused.status == 422 and "lets nobody but its owner through" in refused.json["error"]
    assert not listed(alone)["a"]["public"]


def test_old_sdks_are_not_told_of_what_they_cannot_parse(alone):
    saved(alone, "a", kind="external_weights")
    saved(alone, "b")
    old = {"X-Stainless-Package-Version": "0.25.0"}
    for path in ("checkpoints", f"training_runs/{MODEL}/checkpoints"):
        assert len(alone.get(path).json["checkpoints"]) == 2
        assert [c["checkpoint_type"] for c in alone.get(path, headers=old).json["checkpoints"]] == ["training"]
