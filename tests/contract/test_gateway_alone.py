"""The gateway's own promises, with processes killed, disks full and files damaged around it. No model needed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import serving
import tinker

from tinker_hpc.gateway.app import CLIENT_CONFIG
from tinker_hpc.log import LogReader
from tinker_hpc.private_files import read_json, write_json

WAIT_S = 30
ADAM = {"learning_rate": 1e-3}


def new_session(service: serving.Service) -> str:
    reply = service.post("create_session", {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0"})
    assert reply.status == 200, reply.body
    return reply.json["session_id"]


def new_model(service: serving.Service, session: str | None = None, number: int = 0) -> str:
    ask = {"session_id": session or new_session(service), "model_seq_id": number, "base_model": service.base_model}
    reply = service.post("create_model", {**ask, "lora_config": {"rank": 4}})
    assert reply.status == 200, reply.body
    return reply.json["model_id"]


def step(service: serving.Service, model_id: str, seq_id: int, **more: float) -> serving.Reply:
    return service.post("optim_step", {"model_id": model_id, "seq_id": seq_id, "adam_params": {**ADAM, **more}})


def retrieve(service: serving.Service, request_id: str, iteration: int = 0) -> serving.Reply:
    headers = {"X-Tinker-Request-Iteration": str(iteration)}
    return service.post("retrieve_future", {"request_id": request_id}, headers=headers)


def logged(service: serving.Service) -> list[dict]:
    assert service.run is not None
    return [record.header for record in LogReader(service.run.worker(0).requests).poll()]


# --- who may ask ------------------------------------------------------------------------------------------------


def test_only_the_key_of_this_run_opens_it(alone):
    for key in ("", "tml-wrong", alone.api_key[:-1], alone.api_key + "x"):
        reply = alone.get("get_server_capabilities", headers={"X-API-Key": key})
        assert reply.status == 401 and "wrong or missing API key" in reply.json["error"]
    assert alone.get("healthz", headers={"X-API-Key": ""}).json == {"status": "ok"}
    assert alone.api_key.startswith("tml-") and len(alone.api_key) > 40
    assert alone.run is not None
    assert (alone.run.gateway.stat().st_mode & 0o777) == 0o600


def test_foreign_host_names_are_refused(alone):
    port = alone.base_url.rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", "169.254.1.1", "", f"127.0.0.1.evil.example:{port}"):
        reply = alone.get("get_server_capabilities", headers={"Host": host})
        assert reply.status == 403 and "is not this machine" in reply.json["error"], host
    for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "LOCALHOST"):
        assert alone.get("get_server_capabilities", headers={"Host": host}).status == 200, host


def test_it_listens_on_loopback_only(alone):
    port = int(alone.base_url.rpartition(":")[2])
    listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
    addresses = [line.split()[1] for line in listening if line.split()[3] == "0A"]
    assert f"0100007F:{port:04X}" in addresses
    assert f"00000000:{port:04X}" not in addresses


def test_unknown_routes_and_wrong_bodies_get_one_clear_sentence(alone):
    missing = alone.post("no/such/route", {})
    assert missing.status == 404 and "POST /api/v1/no/such/route is not offered" in missing.json["error"]
    wrong_method = alone.get("create_session")
    assert wrong_method.status == 405 and "is not offered" in wrong_method.json["error"]
    torn = alone.http("POST", "/api/v1/optim_step", b"{")
    assert torn.status == 400 and "is not JSON" in torn.json["error"]
    as_json = alone.post("forward_backward", {})
    assert as_json.status == 415 and "Update tinker" in as_json.json["error"]
    protobuf = {"Content-Type": "application/x-protobuf"}
    garbage = alone.http("POST", "/api/v1/forward_backward", b"\xff\xff", headers=protobuf)
    assert garbage.status == 400 and "not a protobuf ForwardBackwardRequest" in garbage.json["error"]
    packed = alone.http("POST", "/api/v1/forward_backward", b"x", headers={**protobuf, "Content-Encoding": "zstd"})
    assert packed.status == 415 and "Send it plain" in packed.json["error"]


def test_bodies_have_a_limit(alone):
    with socket.create_connection(("127.0.0.1", int(alone.base_url.rpartition(":")[2]))) as connection:
        head = f"POST /api/v1/telemetry HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {alone.api_key}\r\n"
        connection.sendall(f"{head}Content-Length: {2**40}\r\n\r\n".encode())
        answer = ""
        while "}" not in answer and (piece := connection.recv(4096)):
            answer += piece.decode()
    assert answer.startswith("HTTP/1.1 413") and "Send fewer datums" in answer


def test_unknown_ids(alone):
    session = new_session(alone)
    assert alone.post("session_heartbeat", {"session_id": session}).status == 200
    assert alone.post("session_heartbeat", {"session_id": "s-no"}).status == 404
    assert "never accepted it" in retrieve(alone, "nobody:3").json["error"]
    assert retrieve(alone, "nobody:3").status == 404
    for path, body in (
        ("get_info", {"model_id": "m"}),
        ("optim_step", {"model_id": "m", "seq_id": 1, "adam_params": {}}),
        ("asample", {"sampling_session_id": "x", "seq_id": 0, "prompt": {"chunks": []}, "sampling_params": {}}),
        ("weights_info", {"tinker_path": "tinker://m:train:0/weights/a"}),
    ):
        reply = alone.post(path, body)
        assert reply.status == 404, (path, reply.body)
    assert alone.get("samplers/x").status == 404
    assert alone.get("training_runs/s-x:train:0").status == 404
    assert alone.get("sessions/s-no").status == 404
    assert session in alone.get("sessions").json["sessions"]


def test_client_config_has_only_names_the_sdk_knows():
    known = set(tinker.types.ClientConfigResponse.model_fields)
    assert set(CLIENT_CONFIG) <= known


# --- a refused request leaves no hole ---------------------------------------------------------------------------


def test_a_refused_request_has_its_place_in_the_log_and_the_model_goes_on(alone, processes):
    assert alone.run is not None
    serving.start_responder(processes, alone.run.worker(0))
    model = new_model(alone)
    wrong = step(alone, model, 1, beta1=2.0)
    external_ask = {"model_id": model, "seq_id": 2, "path": "x"}
    external = alone.post("save_weights_external", {**external_ask, "age_encryption_recipients": ["age1"]})
    right = step(alone, model, 3)
    for reply in (wrong, external, right):
        assert reply.status == 200, "a place in the order is always taken"
    failed = retrieve(alone, wrong.json["request_id"]).json
    assert failed["category"] == "user" and "AdamParams.beta1 is 2.0, expected 0 <= beta1 < 1" in failed["error"]
    assert "age_encryption_recipients is not offered" in retrieve(alone, external.json["request_id"]).json["error"]
    assert retrieve(alone, right.json["request_id"]).json["metrics"] == {"grad_norm:mean": ADAM["learning_rate"]}
    assert [(h["op"], h["seq_id"]) for h in logged(alone)][1:] == [("rejected", 1), ("rejected", 2), ("optim_step", 3)]


def test_a_refused_creation_fails_its_future(alone):
    session = new_session(alone)
    ask = {"session_id": session, "model_seq_id": 0, "base_model": "Nobody/Nothing", "lora_config": {"rank": 4}}
    reply = alone.post("create_model", ask)
    assert reply.status == 200
    failed = retrieve(alone, reply.json["request_id"]).json
    assert failed["category"] == "user" and "this run serves" in failed["error"]
    later = step(alone, reply.json["model_id"], 1)
    assert later.status == 404 and "its creation was refused" in later.json["error"]


def test_seeds_nobody_gave_are_drawn_and_logged(alone):
    session = new_session(alone)
    new_model(alone, session, 0)
    new_model(alone, session, 1)
    seeds = [header["lora"]["seed"] for header in logged(alone)]
    assert len(set(seeds)) == 2 and all(0 <= seed < 2**63 for seed in seeds)


def test_lora_per_expert_is_the_configurations_choice_and_logged(tmp_path, processes):
    """So that redoing the log makes the same adapter, whatever the configuration says by then."""
    (tmp_path / "config.toml").write_text('expert_lora = "per_expert"\n')
    run, _ = serving.new_run(tmp_path / "root")
    service = serving.start_gateway(processes, run, env={"TINKER_HPC_CONFIG": str(tmp_path / "config.toml")})
    new_model(service)
    assert logged(service)[-1]["lora"]["per_expert"] is True


def test_the_same_request_at_the_same_time_is_one_record(alone):
    model = new_model(alone)
    with ThreadPoolExecutor(16) as threads:
        same = list(threads.map(lambda _: step(alone, model, 1).json, range(32)))
        rates = [0.1, 0.2, 0.3, 0.4]
        different = list(threads.map(lambda rate: step(alone, model, 2, learning_rate=rate), rates))
    assert same == [same[0]] * 32
    assert sorted(reply.status for reply in different) == [200, 422, 422, 422]
    records = [header for header in logged(alone) if header["op"] == "optim_step"]
    assert [header["seq_id"] for header in records] == [1, 2]
    (winner,) = (rate for rate, reply in zip(rates, different, strict=True) if reply.status == 200)
    assert records[1]["adam"]["learning_rate"] == winner


# --- waiting ----------------------------------------------------------------------------------------------------


def test_while_the_worker_waits_the_reason_is_told_soon(alone):
    assert alone.run is not None
    status = alone.run.worker(0).status
    write_json(status, {"phase": "queued", "reason": "Slurm PENDING (Priority), job 8812", "error": None, "since": 0})
    model = new_model(alone)
    time.sleep(1.5)  # the status is looked at once a second
    started = time.monotonic()
    reply = retrieve(alone, f"{model}:0")
    assert reply.status == 408 and time.monotonic() - started < 10
    assert reply.json["queue_state"] == "paused_capacity"
    assert reply.json["queue_state_reason"].startswith("Slurm PENDING (Priority), job 8812, since ")


def test_a_worker_that_ended_fails_what_waits_and_what_comes(alone, processes):
    assert alone.run is not None
    worker = alone.run.worker(0)
    model = new_model(alone)
    pending = step(alone, model, 1)
    answers: list[serving.Reply] = []
    waiting = threading.Thread(target=lambda: answers.append(retrieve(alone, pending.json["request_id"], iteration=1)))
    waiting.start()
    write_json(worker.status, {"phase": "ended", "reason": "", "error": "job 7 ended OUT_OF_MEMORY", "since": 0})
    waiting.join(WAIT_S)
    assert answers[0].json == {"error": "job 7 ended OUT_OF_MEMORY", "category": "server"}
    late = step(alone, model, 2)
    assert retrieve(alone, late.json["request_id"]).json["category"] == "server"
    # The job comes back (resumed): what was accepted is answered after all.
    serving.start_responder(processes, worker)
    serving.wait_for(lambda: "metrics" in retrieve(alone, late.json["request_id"]).json, WAIT_S, "the result")


def test_results_published_before_the_end_are_delivered(alone, processes):
    assert alone.run is not None
    worker = alone.run.worker(0)
    model = new_model(alone)
    step(alone, model, 1)
    serving.start_responder(processes, worker)
    serving.wait_for(lambda: retrieve(alone, f"{model}:1").status == 200, WAIT_S, "the result")
    write_json(worker.status, {"phase": "ended", "reason": "done", "error": None, "since": 0})
    time.sleep(1.5)
    assert "metrics" in retrieve(alone, f"{model}:1").json


# --- restarts ---------------------------------------------------------------------------------------------------


def test_killed_and_started_again_it_is_the_same_gateway(alone, processes):
    assert alone.run is not None
    session = new_session(alone)
    model = new_model(alone, session)
    answered = step(alone, model, 1)
    refused = step(alone, model, 2, beta1=7.0)
    sampler = alone.post(
        "create_sampling_session",
        {"session_id": session, "sampling_session_seq_id": 0, "base_model": alone.base_model},
    ).json["sampling_session_id"]
    before = logged(alone)
    processes.stop("gateway", kill=True)
    again = serving.start_gateway(processes, alone.run)
    assert (again.base_url, again.api_key) == (alone.base_url, alone.api_key)
    # Retries get the first answers and write nothing.
    assert step(again, model, 1).json == answered.json
    assert step(again, model, 2, beta1=7.0).json == refused.json
    assert step(again, model, 1, beta1=0.5).status == 422
    assert logged(again) == before
    assert again.post("session_heartbeat", {"session_id": session}).status == 200
    assert again.post("get_info", {"model_id": model}).json["lora_rank"] == 4
    assert again.get(f"samplers/{sampler}").json["base_model"] == str(serving.TINY)
    assert "beta1 is 7.0" in retrieve(again, f"{model}:2").json["error"]
    serving.start_responder(processes, alone.run.worker(0))
    serving.wait_for(lambda: retrieve(again, f"{model}:1").status == 200, WAIT_S, "the result")
    # And once more, with results already there.
    processes.stop("gateway", kill=True)
    third = serving.start_gateway(processes, alone.run)
    serving.wait_for(lambda: retrieve(third, f"{model}:1").status == 200, WAIT_S, "the result")


def test_the_sdk_does_not_notice_a_restart(alone, processes):
    assert alone.run is not None
    serving.start_responder(processes, alone.run.worker(0))
    client = tinker.ServiceClient(base_url=alone.base_url, api_key=alone.api_key)
    training = client.create_lora_training_client(base_model=alone.base_model, rank=4).result(WAIT_S)
    processes.stop("responder", kill=True)
    waiting = training.optim_step(tinker.AdamParams(learning_rate=0.25))
    serving.wait_for(lambda: len(logged(alone)) == 2, WAIT_S, "the request")
    processes.stop("gateway", kill=True)
    serving.start_gateway(processes, alone.run)
    serving.start_responder(processes, alone.run.worker(0))
    assert waiting.result(WAIT_S).metrics == {"grad_norm:mean": 0.25}
    assert training.optim_step(tinker.AdamParams(learning_rate=0.5)).result(WAIT_S).metrics == {"grad_norm:mean": 0.5}
    client.close("success").result(WAIT_S)


def test_a_second_gateway_of_the_same_run_does_not_start(alone, processes):
    assert alone.run is not None
    code = (
        "from tinker_hpc.gateway import __main__ as m; m.BIND_PATIENCE_S = 0.5; "
        f"raise SystemExit(m.main(['--run-dir', {str(alone.run.path)!r}]))"
    )
    second = processes.start("second", "-c", code)
    assert second.wait(WAIT_S) == 1
    assert "is taken" in processes.log("second") and "Stop it, or start the run again" in processes.log("second")


def test_after_close_nothing_more_is_accepted_and_restarts_know_it(alone, processes):
    assert alone.run is not None
    model = new_model(alone)
    for _ in range(2):
        assert alone.http("POST", "/internal/close").status == 200
    assert [header["op"] for header in logged(alone)] == ["create_model", "close"]
    late = step(alone, model, 1)
    assert late.status == 422 and "this run is closing" in late.json["error"]
    processes.stop("gateway", kill=True)
    again = serving.start_gateway(processes, alone.run)
    assert step(again, model, 1).status == 422
    assert again.post("create_model", {"session_id": "s", "model_seq_id": 0}).status == 404


# --- what the disk can do ---------------------------------------------------------------------------------------


def test_a_full_disk_accepts_nothing_and_recovers(tmp_path):
    with serving.small_disk(tmp_path / "root", "1m"), serving.processes_in(tmp_path) as processes:
        run, _ = serving.new_run(tmp_path / "root")
        service = serving.start_gateway(processes, run)
        model = new_model(service)
        ballast = tmp_path / "root" / "ballast"
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        refused = step(service, model, 1)
        assert refused.status == 503, "which the SDK sends again for five minutes"
        assert "nothing was accepted" in refused.json["error"] and "No space left" in refused.json["error"]
        assert retrieve(service, f"{model}:1").status == 404
        assert [header["op"] for header in logged(service)] == ["create_model"]
        session = service.post("create_session", {})
        assert session.status == 503 and "No space left" in session.json["error"]
        ballast.unlink()
        assert step(service, model, 1).json["request_id"] == f"{model}:1"
        assert [header["op"] for header in logged(service)] == ["create_model", "optim_step"]


def test_a_data_root_that_turns_read_only(tmp_path):
    with serving.small_disk(tmp_path / "root", "1m") as remount, serving.processes_in(tmp_path) as processes:
        run, _ = serving.new_run(tmp_path / "root")
        service = serving.start_gateway(processes, run)
        model = new_model(service)
        remount("ro")
        refused = step(service, model, 1)
        assert refused.status == 503 and "Read-only file system" in refused.json["error"]
        processes.stop("gateway")
        dead = processes.start("readonly", "-m", "tinker_hpc.gateway", "--run-dir", str(run.path))
        assert dead.wait(WAIT_S) == 1
        said = processes.log("readonly")
        assert "Read-only file system" in said and "Traceback" not in said
        remount("rw")
        again = serving.start_gateway(processes, run)
        assert step(again, model, 1).status == 200


@pytest.mark.parametrize("how", ["cut", "changed"])
def test_a_damaged_request_log_stops_the_start_with_its_name(alone, processes, how):
    assert alone.run is not None
    new_model(alone)
    processes.stop("gateway")
    damaged = serving.damage(alone.run.worker(0).requests, how)
    dead = processes.start("damaged", "-m", "tinker_hpc.gateway", "--run-dir", str(alone.run.path))
    assert dead.wait(WAIT_S) == 1
    said = processes.log("damaged")
    assert damaged.name in said and "corrupt at byte" in said and "Traceback" not in said


def test_a_damaged_result_log_fails_what_waits_with_its_name(alone, processes):
    assert alone.run is not None
    worker = alone.run.worker(0)
    model = new_model(alone)
    processes.stop("gateway")
    serving.start_responder(processes, worker)
    serving.wait_for(lambda: len(list(worker.results.rglob("seg-*"))) >= 2, WAIT_S, "the result")
    damaged = serving.damage(worker.results, "cut")
    again = serving.start_gateway(processes, alone.run)
    serving.wait_for(lambda: retrieve(again, f"{model}:0").status == 200, WAIT_S, "an answer")
    answer = retrieve(again, f"{model}:0").json
    assert answer["category"] == "server" and damaged.name in answer["error"]


def test_a_run_folder_that_is_not_there(tmp_path, processes):
    dead = processes.start("nowhere", "-m", "tinker_hpc.gateway", "--run-dir", str(tmp_path / "no"))
    assert dead.wait(WAIT_S) == 1
    assert "no run folder" in processes.log("nowhere")


def test_a_base_model_that_is_not_there(tmp_path, processes):
    shutil.copytree(serving.TINY, tmp_path / "model")
    run, _ = serving.new_run(tmp_path / "root", tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    dead = processes.start("nomodel", "-m", "tinker_hpc.gateway", "--run-dir", str(run.path))
    assert dead.wait(WAIT_S) == 1
    assert "has no config.json" in processes.log("nomodel")


def test_gateway_json_tells_where(alone):
    assert alone.run is not None
    about = read_json(alone.run.gateway)
    assert about["host"] == socket.gethostname() and about["pid"] != os.getpid()
    assert about["base_url"].startswith("http://127.0.0.1:") and about["started_at"] <= time.time()
    assert json.loads(alone.run.sessions.read_text()) if alone.run.sessions.exists() else True
