"""The timeline of a session: every request of it, in order, nothing of others."""

from __future__ import annotations

from tinker_hpc.gateway.trace import belongs, trace_events


def request(number: int, **fields):
    header = {"request_id": f"s-1:train:0:{number}", "op": "optim_step", "model_id": "s-1:train:0", "seq_id": number}
    return {**header, "accepted_at": 100.0 + number, **fields}


def test_requests_become_slices():
    requests = [
        request(1),
        request(2, op="sample", model_id=None, sampling_session_id="s-1:sample:0"),
        request(3, op="rejected", asked="forward_backward", error="wrong"),
        request(4),
    ]
    results = {
        "s-1:train:0:1": {"ok": True, "finished_at": 103.0, "compute_s": 0.5},
        "s-1:train:0:2": {"ok": False, "error": "no", "finished_at": 104.0},
    }
    events = list(trace_events(requests, results, process=0, process_name="m"))
    slices = [(e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert slices == [
        ("queued", 101_000_000, 1_500_000),
        ("optim_step", 102_500_000, 500_000),
        ("sample", 102_000_000, 2_000_000),
    ]
    instants = {e["name"]: e["args"] for e in events if e["ph"] == "i"}
    assert instants["forward_backward"]["error"] == "wrong" and instants["optim_step"]["state"] == "no result yet"
    tracks = {e["args"]["name"]: e["tid"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert set(tracks) == {"s-1:train:0", "s-1:sample:0"} and len(set(tracks.values())) == 2


def test_whose_a_request_is():
    assert belongs({"model_id": "s-1:train:0"}, "s-1") and belongs({"sampling_session_id": "s-1:sample:3"}, "s-1")
    assert not belongs({"model_id": "s-12:train:0"}, "s-1") and not belongs({"op": "close", "model_id": None}, "s-1")
