"""Graphs that nobody would write, of the allowed operations: each is refused in words or computed, in bounded memory.

The SDK never sends these; whoever has the key may. Seeded: FUZZ_SEED=N FUZZ_GRAPHS=M pytest this file.
"""

from __future__ import annotations

import collections
import os
import random
import resource
from typing import Any

import pytest
import torch

from tinker_hpc import custom_loss
from tinker_hpc.custom_loss_ops import ATTRIBUTES, DTYPES, FUNCTIONS, KEYWORDS, METHODS, TEXTS
from tinker_hpc.errors import RequestError
from tinker_hpc.worker.custom_loss import DATUM_INDEX, CustomLossFn

SEED = int(os.environ.get("FUZZ_SEED", "20261125"))
GRAPHS = int(os.environ.get("FUZZ_GRAPHS", "2500"))
TOKENS = 512
MAX_MORE_MIB = 1024
"""Above the process before: 2**26 elements in float64 are 512 MiB, and a backward has the gradient of the largest."""

NUMBERS = (0, 1, -1, 2, 3, -2, 7, 64, 512, 4096, 65536, 2**24, 2**31, -(2**31), 0.0, -0.5, 1e-300, 1e308)
ODD = (None, True, {"ellipsis": True}, {"float": "inf"}, {"float": "nan"}, {"device": "cpu"}, float("nan"))
INPUTS = (("logprobs", 1), ("weights", 1), ("beta", 0))


class Graphs:
    """Draws graphs: calls of allowed operations on earlier results, often with arguments that could be right."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def argument(self, names: list[str], depth: int = 0) -> Any:
        rng = self.rng
        kind = rng.randrange(16 if depth < 2 else 10)
        if kind < 6:
            return {"ref": rng.choice(names)}
        if kind < 9:
            return rng.choice(NUMBERS[: 7 if rng.random() < 0.6 else None])
        if kind < 10:
            return rng.choice((*ODD, {"dtype": rng.choice(sorted(DTYPES))}, rng.choice(sorted(TEXTS))))
        several = [self.argument(names, depth + 1) for _ in range(rng.randrange(4))]
        if kind < 13:
            return several if rng.random() < 0.5 else {"tuple": several}
        if kind < 14:
            return {"slice": [rng.choice((None, self.argument(names, depth + 1))) for _ in range(3)]}
        sizes = [rng.choice((0, 1, -1, 2, 512, 2**20, 2**31)) for _ in range(rng.randrange(4))]
        return sizes if rng.random() < 0.5 else {"tuple": sizes}

    def call(self, name: str, names: list[str]) -> dict[str, Any]:
        rng = self.rng
        if rng.random() < 0.05:
            args = [{"ref": rng.choice(names)}, rng.choice(ATTRIBUTES)]
            return {"op": "call_function", "name": name, "target": "getattr", "args": args}
        method = rng.random() < 0.5
        target = rng.choice(sorted(METHODS if method else FUNCTIONS))
        args = [{"ref": rng.choice(names)}] if method or rng.random() < 0.9 else []
        args += [self.argument(names) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
        keywords = {rng.choice(sorted(KEYWORDS)): self.argument(names) for _ in range(rng.choice((0, 0, 0, 0, 1, 2)))}
        op = "call_method" if method else "call_function"
        return {"op": op, "name": name, "target": target, "args": args, "kwargs": keywords}

    def graph(self) -> dict[str, Any]:
        nodes: list[dict[str, Any]] = [{"op": "placeholder", "name": name, "target": name} for name, _ in INPUTS]
        names = [name for name, _ in INPUTS]
        for number in range(self.rng.randrange(1, 5)):
            nodes.append(self.call(f"n{number}", names))
            names.append(f"n{number}")
        for name in ("other", "total"):
            of = {"ref": names[-1] if name == "other" else "logprobs"}
            nodes.append({"op": "call_method", "name": name, "target": "sum", "args": [of]})
        sums = [{"ref": "other"}, {"ref": "total"}]
        nodes.append({"op": "call_function", "name": "loss", "target": "operator.add", "args": sums})
        output = {"op": "output", "name": "output", "target": "output"}
        nodes.append({**output, "args": [{"tuple": [{"ref": "loss"}, {"dict": {}}]}]})
        inputs = [{"name": name, "rank": rank} for name, rank in INPUTS]
        return {"name": "fuzz", "inputs": inputs, "graph": {"format": 1, "nodes": nodes}}


@pytest.mark.filterwarnings("ignore")  # torch's own, of what such graphs ask of it
def test_any_graph_is_refused_in_words_or_computed_in_bounded_memory() -> None:
    drawn = Graphs(SEED)
    outcomes: collections.Counter[str] = collections.Counter()
    which = {DATUM_INDEX: torch.zeros(TOKENS, dtype=torch.int64)}
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(GRAPHS):
        body = drawn.graph()
        logprobs = -torch.rand(TOKENS, generator=torch.Generator().manual_seed(number))
        try:
            loss = CustomLossFn(custom_loss.read(body), [[torch.ones(TOKENS), torch.tensor(0.5)]])
            loss(logprobs.requires_grad_(), which, torch.zeros(TOKENS, dtype=torch.int64)).backward()
            outcomes["computed"] += 1
        except RequestError as error:
            assert "custom loss 'fuzz'" in str(error)
            outcomes["refused when run" if " on data[" in str(error) else "refused when read"] += 1
        except Exception as error:
            raise AssertionError(f"graph {number} of seed {SEED}: {error!r} from {body['graph']['nodes']}") from error
    more_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 2**10
    print(f"{GRAPHS} graphs: {dict(outcomes)}; {more_mib:.0f} MiB more")
    assert more_mib < MAX_MORE_MIB
    assert len(outcomes) == 3 and min(outcomes.values()) > GRAPHS / 200, "the graphs reach every stage"
