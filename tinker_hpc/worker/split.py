"""The rule for passes that do not fit into memory (pure): smaller micro-batches, at last one sequence at a time.

The micro-batches' token budget is halved until the largest of them is a single sequence, which is never cut. What was
tried last is in the answers (`token_budget`), so redo begins there and gets the same bits. Gradients are sums over
sequences: however they are cut, they are equal but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from megatron_adapters.packing import smaller_budget
from tinker_hpc.log import Record
from tinker_hpc.worker.ranks import Failure


def lengths_of(passes: Iterable[Record]) -> list[int]:
    """Tokens of every sequence of some passes. One whose offsets are nonsense (refused later) counts as one."""
    lengths: list[int] = []
    for request in passes:
        pieces = np.diff(request.arrays["offsets"]).tolist()
        lengths += pieces if pieces and min(pieces) > 0 else [max(1, int(request.arrays["tokens"].size))]
    return lengths


def smaller(passes: Sequence[Record], token_budget: int) -> int | None:
    """The next budget to try; None if each of the largest micro-batches is one sequence already."""
    return smaller_budget(lengths_of(passes), token_budget)


def last_resort(passes: Sequence[Record], token_budget: int) -> int | None:
    """The smallest budget that helps, where every try costs a start of all ranks; None as `smaller`."""
    return max(lengths_of(passes)) if smaller(passes, token_budget) is not None else None


def too_large(request: Record, tried: Sequence[int], failure: Failure) -> Failure:
    """What the user hears of a pass that does not fit at all."""
    lengths = lengths_of([request])
    return Failure(
        "user",
        f"this pass does not fit into the worker's memory. It has {len(lengths)} sequences of {sum(lengths)} tokens, "
        f"the longest {max(lengths)}; micro-batches of at most {', '.join(map(str, tried))} tokens were tried. The "
        "last were single sequences, which are never cut. Its model is unchanged and the worker goes on. Shorten the "
        "longest sequences, give fewer targets a token, or run on more or larger GPUs (--tp-size splits every matrix). "
        f"The device said: {failure.message.splitlines()[0][:300]}",
    )
