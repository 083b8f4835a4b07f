"""A rank that is asked to end by SIGTERM, and how it tells that from a peer's death."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

RANK = """
import sys, time
from tinker_hpc.worker.parting import Parting, leave
parting = Parting()
sys.stdin.readline()  # every rank is there before one of them looks for its peers
parting.arm(None)
print("armed", flush=True)
while not parting.asked:
    time.sleep(0.01)
print("asked", flush=True)
sys.stdin.readline()  # everything is on the disk
leave()
"""


@pytest.fixture
def ranks() -> Iterator[list[subprocess.Popen[str]]]:
    argv = [sys.executable, "-c", RANK]
    made = [subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for rank in made:
        go_on(rank)
    for rank in made:
        assert rank.stdout is not None and rank.stdout.readline() == "armed\n"
    yield made
    for rank in made:
        rank.kill()
        rank.communicate()


def go_on(rank: subprocess.Popen[str]) -> None:
    assert rank.stdin is not None
    rank.stdin.write("\n")
    rank.stdin.flush()


def test_ranks_that_are_asked_end_by_the_signal_when_they_are_done(ranks: list[subprocess.Popen[str]]) -> None:
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    for rank in ranks:
        assert rank.stdout is not None and rank.stdout.readline() == "asked\n"
        rank.send_signal(signal.SIGTERM)  # once more changes nothing
    assert [rank.poll() for rank in ranks] == [None, None]
    go_on(ranks[0])
    assert ranks[0].wait(60) == -signal.SIGTERM


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_whose_peer_is_gone_ends_at_once(ranks: list[subprocess.Popen[str]], how: signal.Signals) -> None:
    """Together they could not take a snapshot any more, and whoever asks wants to start all of them again."""
    ranks[1].send_signal(how)
    ranks[0].send_signal(signal.SIGTERM)
    assert ranks[0].wait(60) == -signal.SIGKILL
