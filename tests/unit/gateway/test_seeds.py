"""Seeds of the server's own: the same wherever the same is asked, however the loop came there."""

from __future__ import annotations

from typing import Any

from tinker_hpc.gateway.ledger import Ledger
from tinker_hpc.gateway.seeds import Age, drawn, without_chance
from tinker_hpc.run_folder import seed_of_run

STEP = {"op": "optim_step"}


def snapshot(name: str) -> dict[str, Any]:
    return {"op": "save_sampler_weights", "sampling_session_id": name}


def test_seeds_are_63_bits_and_all_different() -> None:
    labels = [f"#1:train:0@{step}.0:{seq}" for step in range(40) for seq in range(40)]
    seeds = [drawn(7, label) for label in labels]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert 0.48 < sum((seed >> bit) & 1 for seed in seeds for bit in range(63)) / (63 * len(seeds)) < 0.52
    assert drawn(8, labels[0]) != seeds[0] == drawn(7, labels[0])


def test_a_models_age_is_its_steps_and_its_samplers_at_that_age() -> None:
    age = Age()
    story = [snapshot("a"), snapshot("b"), {"op": "forward_backward"}, STEP, snapshot("c"), {"op": "save_state"}]
    assert [age.note(request) for request in story] == ["0.0", "0.1", None, None, "1.0", None]
    assert str(age) == "1.1"
    resumed = Age("1.1")  # from a state saved now
    assert resumed.note(snapshot("d")) == "1.1" == age.note(snapshot("the same, had it not been killed"))
    assert [resumed.note({"op": "load_state", "age": "5.2"}), resumed.note(snapshot("e"))] == [None, "5.2"]
    assert age.note({"op": "save_sampler_weights", "path": "tinker://..."}) is None, "a file, not a sampler"


def request(seq_id: int, op: str, **fields: Any) -> dict[str, Any]:
    common = {"request_id": f"s:train:0:{seq_id}", "model_id": "s:train:0", "digest": "d", "accepted_at": 1.0}
    return {**common, "op": op, "seq_id": seq_id, "seq": seq_id + 1, **fields}


def test_what_was_taken_back_does_not_age_a_model() -> None:
    """A loop that went back to a checkpoint of its own meets the labels that it would have met unharmed."""
    create = request(0, "create_model", session_id="s", lora={"rank": 8}, base_model="b")
    story = [create, request(1, "optim_step"), request(2, "save_sampler_weights", sampling_session_id="s:train:0:x")]
    ledger = Ledger()
    ledger.replay([*story, *story], 0)  # a record may be in the log twice
    assert ledger.samplers["s:train:0:x"].label == "s:train:0@1.0"
    ledger.take_back([future for future in ledger.futures if future.seq_id == 2])
    again = request(2, "save_sampler_weights", sampling_session_id="s:train:0:y", request_id="s:train:0:2~1", seq=9)
    ledger.apply(again, 0)
    assert ledger.samplers["s:train:0:y"].label == "s:train:0@1.0"

    ledger.take_back(list(ledger.futures))
    state = {"folder": "f", "path": "p", "optimizer": True, "age": "1.0"}
    ledger.apply({**create, "request_id": "s:train:0:0~1", "from_state": state, "seq": 10}, 0)
    ledger.apply(request(1, "save_sampler_weights", sampling_session_id="s:train:0:z", request_id="r~1", seq=11), 0)
    assert ledger.samplers["s:train:0:z"].label == "s:train:0@1.0"


def test_the_random_ids_of_sessions_are_no_part_of_it() -> None:
    sessions = [("s-1a", 1), ("s-2b", 2)]
    assert without_chance("tinker://s-2b:train:0/weights/x", sessions) == "tinker://#2:train:0/weights/x"


def test_the_seed_of_a_run() -> None:
    own = seed_of_run("r-1", {})
    assert own == seed_of_run("r-1", {"PYTHONHASHSEED": "random"}) != seed_of_run("r-2", {})
    assert seed_of_run("r-1", {"PYTHONHASHSEED": "12"}) == 12 == seed_of_run("r-2", {"PYTHONHASHSEED": "12"})
    assert seed_of_run("r-1", {"PYTHONHASHSEED": str(2**32)}) == own
