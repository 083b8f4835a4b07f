"""A group of passes on this rank: all of their data once through the model, and every rank knows the results.

Whatever fails, the gradients are as they were before, and every rank says the same about it; but for a rank that fails
in the middle of what others compute with it, which says so alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from tinker_hpc.errors import RequestError

from . import runtime
from .adapters import Adapter
from .interface import Pass
from .mixed_batch import Results, arrange
from .model import Model
from .runtime import Runtime
from .training_pass import TrainingPass, plan_micro_batches


def run_together(
    model: Model, passes: Sequence[Pass], adapters: Mapping[str, Adapter], token_budget: int, *, backward: bool
) -> Results:
    """Run passes whose data have been checked. Where one failed, all gradients are as they were before.

    Args:
        adapters: those of the passes, their state on the device. token_budget: most tokens of a micro-batch.
    Raises: what the model raises, on every rank the same where each computes by itself. Where they compute together
        (Layout.computes_together) the rank that failed raises at once and the others may hang in what it left: the
        caller has to find out who is there (tinker_hpc/worker/ranks.py, which waits a minute).
    Collectives: those of TrainingPass; then, with several copies or stages, the results over the control group.
    """
    saved = {key: adapter.grads.clone() for key, adapter in adapters.items() if backward and adapter.has_gradients}

    def restore() -> None:
        for key, adapter in adapters.items():
            if backward:
                adapter.restore_grad(saved.get(key))

    results = Results.empty(passes)
    items = arrange(passes)
    lengths = [len(item.datum.tokens) for item in items]
    layout, place = model.runtime.layout, model.runtime.place
    batches = plan_micro_batches(lengths, layout, place.dp_rank, token_budget)
    loras = {key: adapter.lora for key, adapter in adapters.items()}
    failure: Exception | None = None
    try:
        running = TrainingPass(model, passes, loras, results, backward)
        running.run([([items[index] for index in batch.members], batch.is_long) for batch in batches])
    except Exception as error:
        if layout.computes_together:  # those that wait for this rank in the middle of the pass never come to us below
            restore()
            raise
        failure = error  # another data-parallel rank may have had other data, and waits for us below
    model.gets_on(sum(lengths))  # now it may have to wait for copies that have more to do, or other data
    if layout.dp_size * layout.pp_size > 1:
        failure = runtime.first_failure(model.runtime, failure)
        if failure is None:
            _share(results, model.runtime)
    if failure is not None:
        restore()
        raise failure
    if backward:
        for index, total in enumerate(results.loss_sums.tolist()):
            if not np.isfinite(total) and index not in results.failures:
                results.failures[index] = RequestError(
                    f"the loss of this pass is {total}, so its gradients were not added. Look for NaN or infinite "
                    "loss inputs, or weights that a large learning rate has destroyed."
                )
        if results.failures:
            restore()
            return results
        for adapter in adapters.values():
            adapter.has_gradients = True
    return results


def _share(results: Results, ranks: Runtime) -> None:
    """Give every rank the results of all. Every number is computed by one data-parallel rank of the last stage and
    zero elsewhere (but on its TP ranks, which hold the same), so the sum is a gather.
    """
    losses = torch.from_numpy(results.loss_sums)
    flat = torch.cat([torch.from_numpy(piece).flatten() for pieces in results.logprobs for piece in pieces])
    if ranks.tp_rank > 0:
        losses.zero_()
        flat.zero_()
    dist.all_reduce(losses, group=ranks.control_group)
    dist.all_reduce(flat, group=ranks.control_group)
    start = 0
    for pieces in results.logprobs:
        for place, piece in enumerate(pieces):
            pieces[place] = flat[start : start + piece.size].view(piece.shape).numpy()
            start += piece.size
    results.failures = runtime.first_failures(ranks, results.failures, len(results.loss_sums))
