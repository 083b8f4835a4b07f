"""In which order a pipeline stage works on the micro-batches. Pure; links.py moves the tensors.

One forward one backward (Narayanan et al. 2021, arXiv:2104.04473, "PipeDream-Flush"): a stage keeps the activations of
at most pp_size micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator

Step = tuple[str, int]
"""("forward" or "backward", number of the micro-batch)"""


def schedule(num_micro_batches: int, stage: int, num_stages: int, *, backward: bool) -> Iterator[Step]:
    """What a stage does, in order. A backward of micro-batch i comes after its forward, and both go by i. Pure."""
    if not backward:
        yield from (("forward", index) for index in range(num_micro_batches))
        return
    warm_up = min(num_stages - 1 - stage, num_micro_batches)
    yield from (("forward", index) for index in range(warm_up))
    for index in range(warm_up, num_micro_batches):
        yield "forward", index
        yield "backward", index - warm_up
    yield from (("backward", index) for index in range(num_micro_batches - warm_up, num_micro_batches))
