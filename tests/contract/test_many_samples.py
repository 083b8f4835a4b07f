"""Thousands of samples in flight: few file descriptors, bounded memory; and a client that dies in the middle."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import serving
import tinker

from tinker_hpc.log import ResultReader

pytestmark = pytest.mark.slow

WAIT_S = 300
NUM_SAMPLES = 2000
MAX_FDS = 640
"""More than when idle, of the client and of the gateway, whatever the number of samples: the SDK sends at most 400
requests at once and fetches the answers it was told of, at most two batches of 64. Measured 532; it would be 2,000."""
MAX_GATEWAY_MIB, MAX_WORKER_MIB = 100, 600
"""More than when idle; measured 18 and 348, of which the worker's is the cache and torch's own for 256 rows a step."""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[serving.Service, serving.Processes]]:
    """A gateway and a worker whose processes are ours to measure."""
    folder = tmp_path_factory.mktemp("many")
    run, worker = serving.new_run(folder / "root")
    with serving.processes_in(folder) as processes:
        service = serving.start_gateway(processes, run)
        serving.start_worker(processes, worker)
        yield service, processes


def num_fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def rank_of(agent: int) -> int:
    """The rank under torch's elastic agent: its child with the most memory."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return max(map(int, children), key=rss_mib)


def foreign_peers(gateway: int) -> set[int]:
    """Ports of the other processes that hold a connection to the gateway."""
    peers = {c.raddr.port for c in psutil.Process(gateway).net_connections("tcp") if c.raddr}
    return peers - {c.laddr.port for c in psutil.Process().net_connections("tcp")}


class Peaks:
    """The most each number has been since `watching` began, above its start."""

    def __init__(self, gateway: int, worker: int) -> None:
        self._numbers = {
            "client fds": lambda: num_fds(os.getpid()),
            "gateway fds": lambda: num_fds(gateway),
            "gateway MiB": lambda: rss_mib(gateway),
            "worker MiB": lambda: rss_mib(worker),
        }
        self._start = {name: read() for name, read in self._numbers.items()}
        self.above = dict.fromkeys(self._numbers, 0.0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.02):
                for name, read in self._numbers.items():
                    self.above[name] = max(self.above[name], read() - self._start[name])

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def test_two_thousand_samples_in_flight(own):
    service, processes = own
    client = tinker.ServiceClient(base_url=service.base_url, api_key=service.api_key)
    sampler = client.create_sampling_client(base_model=service.base_model).result(WAIT_S)
    params = tinker.SamplingParams(max_tokens=8, temperature=1.0, stop=[])
    prompts = [tinker.ModelInput.from_ints([3 + i % 900, 5 + i // 900, 7]) for i in range(NUM_SAMPLES)]
    sampler.sample(prompts[0], 1, params).result(WAIT_S)
    peaks = Peaks(processes.running["gateway"].pid, rank_of(processes.running["worker"].pid))
    requests = Path(str(service.run.worker(0).requests))
    segments_before = {path.name for path in requests.iterdir()}
    started = time.monotonic()
    seen: set[str] = set()
    with peaks.watching():
        futures = [sampler.sample(prompt, 1, params) for prompt in prompts]
        for future in futures:
            (sequence,) = future.result(WAIT_S).sequences
            assert len(sequence.tokens) == 8
            seen.add(sequence.sequence_id)
    seconds = time.monotonic() - started
    assert len(seen) == NUM_SAMPLES
    new_segments = len({path.name for path in requests.iterdir()} - segments_before)
    print(
        f"\n{NUM_SAMPLES} SAMPLES in {seconds:.1f} s, above idle:",
        {k: round(v) for k, v in peaks.above.items()},
        end="",
    )
    print(f"; {new_segments} segments in the log")
    assert peaks.above["client fds"] <= MAX_FDS and peaks.above["gateway fds"] <= MAX_FDS
    assert peaks.above["gateway MiB"] <= MAX_GATEWAY_MIB and peaks.above["worker MiB"] <= MAX_WORKER_MIB
    client.close("success").result(WAIT_S)


MORTAL = """
import sys, time, tinker
service = tinker.ServiceClient(base_url=sys.argv[1], api_key=sys.argv[2])
sampler = service.create_sampling_client(base_model=sys.argv[3]).result(60)
params = tinker.SamplingParams(max_tokens=150, temperature=1.0, stop=[])
futures = [sampler.sample(tinker.ModelInput.from_ints([3 + i, 9]), 1, params) for i in range(300)]
print(sampler._sampling_session_id, flush=True)
futures[0].result(120)
print("first", flush=True)
time.sleep(600)
"""


def test_a_client_killed_in_the_middle_of_its_polls_costs_nothing(own):
    service, processes = own
    gateway = processes.running["gateway"].pid
    survivor = tinker.ServiceClient(base_url=service.base_url, api_key=service.api_key)
    sampler = survivor.create_sampling_client(base_model=service.base_model).result(WAIT_S)
    params = tinker.SamplingParams(max_tokens=60, temperature=0, stop=[])
    prompt = tinker.ModelInput.from_ints([5, 6])
    expected = sampler.sample(prompt, 1, params).result(WAIT_S).sequences[0].tokens

    argv = [sys.executable, "-c", MORTAL, service.base_url, service.api_key, service.base_model]
    mortal = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert mortal.stdout is not None
    sampling_session_id = mortal.stdout.readline().strip()
    mine = [sampler.sample(prompt, 1, params) for _ in range(20)]
    assert mortal.stdout.readline() == "first\n"
    assert foreign_peers(gateway)
    os.kill(mortal.pid, signal.SIGKILL)
    mortal.wait()
    mortal.stdout.close()

    assert [future.result(WAIT_S).sequences[0].tokens for future in mine] == [expected] * 20
    serving.wait_for(lambda: not foreign_peers(gateway), 30, "the gateway letting go of the dead client's connections")

    # Every sample of the dead client is computed once, and whoever asks for one gets it.
    asked = {f"{sampling_session_id}:{seq_id}" for seq_id in range(300)}
    reader, computed = ResultReader(service.run.worker(0).path), Counter()

    def all_done() -> bool:
        while records := reader.poll():
            computed.update(r.header["request_id"] for r in records if r.header.get("request_id") in asked)
        return computed.keys() == asked

    serving.wait_for(all_done, WAIT_S, "the results of the dead client's samples")
    body = {"target": {"sampling_session_id": sampling_session_id}, "timeout": 0}
    told = {completion["request_id"] for completion in service.post("retrieve_futures", body).json["completions"]}
    assert told and told <= asked
    for request_id in told | {f"{sampling_session_id}:0"}:
        assert service.post("retrieve_future", {"request_id": request_id}).status == 200
    all_done()
    assert set(computed.values()) == {1}
    survivor.close("success").result(WAIT_S)


def test_a_sample_nobody_waits_for_any_more_is_stopped(own):
    service, _ = own
    client = tinker.ServiceClient(base_url=service.base_url, api_key=service.api_key)
    sampler = client.create_sampling_client(base_model=service.base_model).result(WAIT_S)
    long = tinker.SamplingParams(max_tokens=480, temperature=1.0, stop=[])

    async def abandon() -> str:
        sample = asyncio.ensure_future(
            asyncio.wait_for(sampler.sample(tinker.ModelInput.from_ints([5]), 200, long), 600)
        )
        await asyncio.sleep(1.0)
        sample.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sample
        return f"{sampler._sampling_session_id}:0"

    request_id = asyncio.run(abandon())
    serving.wait_for(
        lambda: (
            service.post(
                "retrieve_future", {"request_id": request_id}, headers={"x-tinker-request-iteration": "1"}
            ).status
            == 200
        ),
        60,
        "the end of the cancelled sample",
    )
    answer = service.post("retrieve_future", {"request_id": request_id}).json
    assert answer == {"error": "this sample was cancelled by its client", "category": "user"}
    again = sampler.sample(tinker.ModelInput.from_ints([5]), 1, tinker.SamplingParams(max_tokens=2)).result(WAIT_S)
    assert again.sequences
    assert service.post("cancel_future", {"request_id": request_id}).status == 204, "done is done"
    assert service.post("cancel_future", {"request_id": "x"}).status == 404
    client.close("success").result(WAIT_S)
