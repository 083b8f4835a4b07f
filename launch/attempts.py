"""Which job works on a run now, and how the ones before it ended.

    attempts/claim-<n>    who: made once (O_EXCL), never changed; the highest number holds the run
    attempts/alive-<n>    the holder's heartbeat, replaced every few seconds
    attempts/end-<n>      how it ended, once; missing if it was killed

A claim is a fence as the worker's lease is (log/lease.py): Slurm may start a second copy while the first still runs on
a node that is only unreachable. The newcomer claims, the old one sees the higher number within a second, ends
everything it started and stops; the newcomer waits until the old heart has stopped. On a node cut off from the shared
filesystem nothing can be written, and the worker's lease refuses what is written later.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from typing import Any, TextIO

from launch import process_tree, progress
from launch.chain import FROM_OUTSIDE, WITHOUT_A_WORD, Attempt
from launch.progress import Credit
from tinker_hpc.patience import until_written
from tinker_hpc.private_files import make_private, read_json, write_json
from tinker_hpc.run_folder import RunFolder

BEAT_S = 1.5
DEAD_AFTER_S = 6.0
"""A heart that has not moved for so long, by the watcher's own clock, has stopped."""
_LONG_DEAD_S = 30.0
"""A heartbeat that is older by the two nodes' clocks needs no watching. Far more than clocks of one cluster differ."""
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_CLAIM = re.compile(r"claim-(\d{6,})")


def begin(run_folder: RunFolder, who: dict[str, Any]) -> int:
    """Take the run, from whoever has it, and return this attempt's number.

    Args: who: job_id, host, pid: for messages, and to see on the same host that the process is gone.
    """
    folder = until_written(lambda: make_private(run_folder.attempts))
    me = process_tree.identity(os.getpid())
    text = json.dumps(
        {**who, "process_start": me.start if me else None, "claimed_at": time.time(), **progress.marks(run_folder)}
    )
    while True:
        number = holder(run_folder) + 1
        try:
            descriptor = until_written(lambda number=number: os.open(folder / _name("claim", number), _NEW, 0o600))
        except FileExistsError:  # another job was a moment faster: go above it
            continue
        with os.fdopen(descriptor, "w") as file:
            until_written(lambda file=file: _write(file, text))
        beat(run_folder, number)
        return number


def holder(run_folder: RunFolder) -> int:
    """The number of the attempt that holds the run; 0 before the first. Lists the folder afresh."""
    try:
        names = os.listdir(run_folder.attempts)
    except FileNotFoundError:
        return 0
    return max((int(m[1]) for m in map(_CLAIM.fullmatch, names) if m), default=0)


def claim_of(run_folder: RunFolder, number: int) -> dict[str, Any]:
    """What an attempt wrote when it began; {} if there is none (yet)."""
    try:
        return read_json(run_folder.attempts / _name("claim", number)) or {}
    except ValueError:  # between its creation and its text
        return {}


def newest_claim(run_folder: RunFolder) -> dict[str, Any] | None:
    """The claim of the attempt that holds the run; None if no job has begun."""
    number = holder(run_folder)
    return claim_of(run_folder, number) if number else None


def beat(run_folder: RunFolder, number: int) -> None:
    """Say that this attempt lives. Not durable, and a full disk is no reason to stop."""
    path = run_folder.attempts / _name("alive", number)
    temporary = path.with_name(f".{path.name}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(repr(time.time()))
        os.replace(temporary, path)
    except OSError:
        pass


def end(
    run_folder: RunFolder, number: int, *, reason: str, error: str | None, exit_code: int, progressed: bool
) -> None:
    """Write how an attempt ended; the next job need not watch its heart then."""
    value = {"reason": reason, "error": error, "exit_code": exit_code, "progress": progressed, "ended_at": time.time()}
    try:
        write_json(run_folder.attempts / _name("end", number), value)
    except OSError as trouble:
        print(f"tinker_hpc: {trouble} It would have said: {value}", flush=True)


def wait_until_gone(
    run_folder: RunFolder,
    number: int,
    *,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> float:
    """Wait until an attempt that was just superseded has ended, and return for how long (seconds)."""
    began = now()
    seen, since = None, began
    while True:
        names = set(os.listdir(run_folder.attempts))
        if _name("end", number) in names or _name("alive", number) not in names:
            return now() - began
        claim = claim_of(run_folder, number)
        if claim.get("host") == process_tree.this_host() and claim.get("process_start") is not None:
            who = process_tree.ProcessIdentity(int(claim["pid"]), int(claim["process_start"]), str(claim["host"]))
            if not process_tree.is_alive(who):
                return now() - began
        last = _read_beat(run_folder, number)
        if last is not None and time.time() - last > _LONG_DEAD_S:
            return now() - began
        if last != seen:
            seen, since = last, now()
        if now() - since >= DEAD_AFTER_S:
            return now() - began
        sleep(0.2)


def history(run_folder: RunFolder, *, credit: Credit, before: int | None = None) -> list[Attempt]:
    """Every attempt since the run was submitted or resumed, oldest first.

    Args:
        credit: what counts as progress (progress.py).
        before: leave out attempts from this number on.
    """
    first = int((read_json(run_folder.attempts / "resumed.json") or {}).get("after", 0))
    last = holder(run_folder) if before is None else before - 1
    found: list[Attempt] = []
    for number in range(first + 1, last + 1):
        claim = claim_of(run_folder, number)
        said = read_json(run_folder.attempts / _name("end", number))
        if said is None:
            made = progressed(run_folder, number, credit=credit)
            said = {"reason": WITHOUT_A_WORD, "progress": made, "exit_code": 128 + 9}
        found.append(
            Attempt(
                number=number,
                job_id=str(claim.get("job_id", "?")),
                reason=str(said["reason"]),
                progress=bool(said["progress"]),
                error=said.get("error"),
                exit_code=int(said.get("exit_code", 1)),
            )
        )
    return found


def last_end_in_words(run_folder: RunFolder) -> str:
    """How the newest attempt ended, if it did and left a note; else ""."""
    number = holder(run_folder)
    if number == 0 or _name("end", number) not in os.listdir(run_folder.attempts):
        return ""
    said = read_json(run_folder.attempts / _name("end", number)) or {}
    return FROM_OUTSIDE.get(str(said.get("reason")), "")


def start_afresh(run_folder: RunFolder) -> None:
    """Forget the past attempts as far as the rule of chain.py goes: the user resumes the run."""
    make_private(run_folder.attempts)
    write_json(run_folder.attempts / "resumed.json", {"after": holder(run_folder), "at": time.time()})


def takes_requests(run_folder: RunFolder) -> bool:
    """Whether the worker of the attempt that holds the run has started, and its job's heart beats."""
    number = holder(run_folder)
    if number == 0 or _name("end", number) in os.listdir(run_folder.attempts):
        return False
    last = _read_beat(run_folder, number)
    alive = last is not None and time.time() - last < _LONG_DEAD_S
    return alive and progress.is_ready(run_folder, claim_of(run_folder, number))


def progressed(run_folder: RunFolder, number: int, *, credit: Credit) -> bool:
    """Whether an attempt brought the run forward (progress.py)."""
    claims = claim_of(run_folder, number), claim_of(run_folder, number + 1)
    return progress.made(run_folder, *claims, credit=credit)


def _write(file: TextIO, text: str) -> None:
    """All of it from the beginning, durable."""
    os.pwrite(file.fileno(), text.encode(), 0)
    os.fsync(file.fileno())


def _read_beat(run_folder: RunFolder, number: int) -> float | None:
    try:
        return float((run_folder.attempts / _name("alive", number)).read_text())
    except (OSError, ValueError):
        return None


def _name(kind: str, number: int) -> str:
    return f"{kind}-{number:06d}"
