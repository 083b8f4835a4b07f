"""What a run left behind, in a form that two runs can be compared by; and whether its logs hold each request once."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

from tinker_hpc.log import LogReader, ResultReader
from tinker_hpc.run_folder import RunFolder, checkpoint_folder


@dataclass(frozen=True)
class Left:
    """Everything of a run that must not depend on what happened to it."""

    returned: str
    """What the loop printed last, without the checkpoint's path: its name holds a random session id."""
    state: str
    """Hash of every tensor of adapter and optimizer."""
    requests: dict[str, int] = field(default_factory=dict)
    """How many requests of each kind are in the log."""
    num_answers: int = 0


def left_by(folder: RunFolder) -> Left:
    """Read it. Raises: AssertionError naming what was lost, or done twice."""
    printed = json.loads((folder.logs / "loop.log").read_text().splitlines()[-1])
    path = printed.pop("checkpoint")
    model_id, _, name = path.removeprefix("tinker://").split("/")
    requests, num_answers = exactly_once(folder)
    return Left(
        json.dumps(printed, sort_keys=True),
        hash_of(checkpoint_folder(folder.data_root, model_id, "weights", name)),
        requests,
        num_answers,
    )


def hash_of(folder: Path) -> str:
    """Of all tensors in a folder: bytes, names, and the optimizer's step count."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            digest.update(f"{path.name} {sorted(file.metadata().items())}".encode())
            for key in sorted(file.keys()):
                digest.update(key.encode() + file.get_tensor(key).tobytes())
    return digest.hexdigest()


def exactly_once(folder: RunFolder) -> tuple[dict[str, int], int]:
    """Kinds of requests and the number of answers.

    Raises: AssertionError if a request has no answer or two, or there is an answer to none.
    """
    kinds: Counter[str] = Counter()
    num_answers = 0
    for worker in folder.workers():
        asked: dict[int, str] = {}
        reader = LogReader(worker.requests)
        while records := reader.poll():
            asked.update({record.header["seq"]: record.header["op"] for record in records})
        answers: Counter[int] = Counter()
        results = ResultReader(worker.path)
        while records := results.poll():
            answers.update(record.header["seq"] for record in records if "ok" in record.header)
        expected = {seq for seq, op in asked.items() if op not in ("close", "rejected")}
        lost = sorted(expected - set(answers))
        assert not lost, f"requests without an answer: {lost[:5]}"
        twice = sorted(seq for seq, count in answers.items() if count > 1)
        assert not twice, f"requests answered twice: {twice[:5]}"
        strange = sorted(set(answers) - expected)
        assert not strange, f"answers to nothing: {strange[:5]}"
        kinds.update(op for op in asked.values() if op != "close")
        num_answers += sum(answers.values())
    return dict(kinds), num_answers
