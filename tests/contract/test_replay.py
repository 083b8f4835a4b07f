"""A loop that was started again is given the recorded answers, and goes on; or it leaves the recorded path, and
training goes back with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import serving
import tinker
from safetensors.numpy import load_file

from tinker_hpc.log import LogReader
from tinker_hpc.private_files import read_json

PROGRAM = str(serving.HERE / "replayed_program.py")
REPLAY_STEPS = 300


def start(service: serving.Service, **asked: Any) -> list[dict[str, Any]]:
    """Run the program to its end, or its death; what it printed."""
    env = serving.program_environment(service)
    argv = [sys.executable, PROGRAM, service.base_model, json.dumps(asked)]
    done = subprocess.run(argv, env=env, capture_output=True, timeout=280, check=False)
    assert done.returncode == (0 if asked.get("die_at") is None else -9), done.stderr.decode()[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def numbers(printed: list[dict[str, Any]]) -> list[Any]:
    return [(line["step"], line["numbers"], line["tokens"]) for line in printed if "step" in line]


def state_of(service: serving.Service, printed: list[dict[str, Any]]) -> dict[str, bytes]:
    """The tensors of the state saved at the end."""
    assert service.run is not None
    model_id, kind, name = printed[-1]["path"].removeprefix("tinker://").split("/")
    folder = service.run.data_root / "checkpoints" / model_id.replace(":", "_") / kind / name
    files = [load_file(folder / f"{part}.safetensors") for part in ("adapter_model", "optimizer")]
    return {f"{index}{key}": values.tobytes() for index, tensors in enumerate(files) for key, values in tensors.items()}


def num_requests(service: serving.Service) -> int:
    assert service.run is not None
    return len(LogReader(service.run.worker(0).requests).poll())


@pytest.mark.slow
def test_a_loop_dies_and_comes_back_and_leaves_the_recorded_path(tmp_path: Path, calm_run: serving.CalmRun) -> None:
    with serving.processes_in(tmp_path) as mine:
        run, worker = serving.new_run(tmp_path / "root")
        run.begin_loop()
        service = serving.start_gateway(mine, run)
        serving.start_worker(mine, worker)
        first = start(service, steps=5, sample=True, die_at=3)
        assert numbers(first) == calm_run.numbers[:3]

        # Its node died: gateway and loop with it. The same program, from its beginning.
        mine.stop("gateway", kill=True)
        run.begin_loop()
        service = serving.start_gateway(mine, run)
        second = start(service, steps=5, sample=True)
        assert numbers(second) == calm_run.numbers
        assert second[0]["model_id"] == first[0]["model_id"], "the same session"
        assert state_of(service, second) == calm_run.state
        assert num_requests(service) == calm_run.num_requests, "nothing was asked of the worker twice"

        # Started once more by somebody who changed the data from step 2 on; the gateway lives on this time.
        run.begin_loop()
        third = start(service, steps=5, sample=True, other_from=2)
        assert numbers(third) == calm_run.other_numbers
        assert state_of(service, third) == calm_run.other_state, "saved over what does not count any more"
        assert "left the recorded path at request 7 of" in mine.log("gateway")
        assert "training continues from the state before them" in mine.log("gateway")
        rewinds = read_json(worker.rewinds)
        assert len(rewinds) == 1 and rewinds[0]["seqs"][0][0] > 9
        steps = [json.loads(line)["step"] for line in worker.metrics.read_text().splitlines()]
        assert steps == [1, 2, 3, 4, 5], "steps that were taken back are not in the curve"

        # All of it again, after both were killed: what was taken back stays away.
        mine.stop("gateway", kill=True)
        mine.stop("worker", kill=True)
        run.begin_loop()
        service = serving.start_gateway(mine, run)
        serving.start_worker(mine, worker)
        before = num_requests(service)
        fourth = start(service, steps=6, sample=True, other_from=2)
        assert numbers(fourth)[:5] == calm_run.other_numbers and len(numbers(fourth)) == 6
        assert num_requests(service) > before


@pytest.mark.slow
def test_a_retried_snapshot_does_not_rename_the_samplers_after_it(tmp_path: Path, processes: serving.Processes) -> None:
    """The SDK counts a snapshot that it had to send twice as two samplers. A loop that is started again, and has to
    send it once, is given the recorded samples all the same: it asks nothing that was not asked before.
    """
    run, worker = serving.new_run(tmp_path / "root")
    serving.start_responder(processes, worker)

    def loop(*, outage: bool) -> list[Any]:
        run.begin_loop()
        about = serving.start_gateway(processes, run)
        service = tinker.ServiceClient(base_url=about.base_url, api_key=about.api_key)
        model = serving.done(service.create_lora_training_client(base_model=about.base_model, rank=4))

        def tries_counted() -> int:
            return service.holder._sampling_client_counter or 0

        if outage:
            processes.stop("gateway", kill=True)
        snapshot = model.save_weights_and_get_sampling_client()
        if outage:
            serving.wait_for(lambda: tries_counted() > 1, 60, "a second try")
            serving.start_gateway(processes, run)
        samplers = [serving.done(snapshot)]
        samplers += [serving.done(service.create_sampling_client(base_model=about.base_model)) for _ in range(2)]
        path = serving.done(model.save_weights_for_sampler("kept")).path
        assert (tries_counted() > 3) == outage
        params = tinker.SamplingParams(max_tokens=3)
        prompts = [tinker.ModelInput.from_ints([5 + place]) for place in range(3)]
        found = [
            serving.done(sampler.sample(prompt=prompt, num_samples=2, sampling_params=params)).sequences
            for sampler, prompt in zip(samplers, prompts, strict=True)
        ]
        processes.stop("gateway", kill=True)
        return [path, [[sequence.tokens for sequence in sequences] for sequences in found]]

    asked = LogReader(worker.requests)
    first = loop(outage=True)
    samples = [record for record in asked.poll() if record.header["op"] == "sample"]
    assert len({record.header["sampling_session_id"] for record in samples}) == 3, "each is a sampler of its own"
    assert len({record.header["seed"] for record in samples}) == 3
    assert loop(outage=False) == first
    assert asked.poll() == [], "everything was recorded"


@pytest.mark.slow
def test_a_long_replay_and_a_closed_run_can_go_on(tmp_path: Path, processes: serving.Processes) -> None:
    run, worker = serving.new_run(tmp_path / "root")
    run.begin_loop()
    service = serving.start_gateway(processes, run)
    serving.start_responder(processes, worker)
    recorded = start(service, steps=REPLAY_STEPS)
    assert service.http("POST", "/internal/close").status == 200
    processes.running["responder"].wait(60)
    processes.stop("gateway", kill=True)
    run.begin_loop()
    service = serving.start_gateway(processes, run)
    printed = start(service, steps=REPLAY_STEPS)
    assert numbers(printed) == numbers(recorded)
    took_s = printed[-1]["at"] - printed[0]["at"]
    recorded_s = recorded[-1]["at"] - recorded[0]["at"]
    print(f"replay of {REPLAY_STEPS} steps: {took_s:.1f} s; recording them: {recorded_s:.1f} s")
    assert service.post("create_session").status == 200, "the run is open again"
