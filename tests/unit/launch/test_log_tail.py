"""Finding the telling words in a log."""

from __future__ import annotations

from pathlib import Path

from launch.log_tail import error_line, last_lines, last_traceback, read_tail, worker_words

AGENT = (
    "E1123 21:53:40.718000 15322 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: {code}) "
    "local_rank: 1 (pid: 15343) of binary: python\n"
    "Traceback (most recent call last):\n"
    '  File "run.py", line 1019, in run\n'
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n"
    "============================================================\n"
    "  rank      : 0 (local_rank: 0)\n"
)
PLAIN = 'epoch 1\nTraceback (most recent call last):\n  File "a.py", line 3, in <module>\nValueError: no luck\n'


def test_error_line() -> None:
    assert error_line(PLAIN) == "ValueError: no luck"
    assert error_line("[rank1]: tinker_hpc.errors.WeightsError: misshapen\nmore\n") == (
        "tinker_hpc.errors.WeightsError: misshapen"
    )
    assert error_line("ErrorHandling is fine\nall good\n") is None


def test_last_traceback() -> None:
    text = last_traceback("Traceback (most recent call last):\nOldError: x\n\n" + PLAIN)
    assert text is not None and text.startswith("Traceback") and "OldError" not in text
    chained = PLAIN + "\nDuring handling of the above exception, another exception occurred:\n\n" + PLAIN
    both = last_traceback(chained)
    assert both is not None and both.count("Traceback") == 2
    assert last_traceback("nothing here") is None


def test_a_ranks_words_not_the_agents() -> None:
    assert worker_words("worker rank 0 ends: no config.json\n" + AGENT.format(code=1)) == (
        "worker rank 0 ends: no config.json"
    )
    assert worker_words("python: No module named x\n" * 4 + AGENT.format(code=1)) == "python: No module named x"
    assert worker_words("") == "no word in its log"


def test_a_rank_that_was_killed() -> None:
    said = worker_words("[rank0]: RuntimeError: Connection closed by peer\n" + AGENT.format(code=-9))
    assert said.startswith("local rank 1 was ended by SIGKILL, most likely for want of memory")
    assert "Connection closed by peer" in said
    assert "SIGSEGV; the last" in worker_words(AGENT.format(code=-11))


def test_read_tail(tmp_path: Path) -> None:
    log = tmp_path / "loop.log"
    assert read_tail(log) == ""
    log.write_bytes(b"first life\n\xff\n")
    start = log.stat().st_size
    with log.open("ab") as file:
        file.write(b"second life\n" * 10_000)
    assert read_tail(log, since=start).count("second life") <= 64 * 1024 // 12 + 1
    assert "first life" not in read_tail(log, since=start)


def test_last_lines() -> None:
    assert last_lines("a\n\nb\nb\nc\n", 3) == "b\nc"
