"""Which datum goes to which data-parallel rank and into which micro-batch. Pure, and equal on every rank."""

from __future__ import annotations

from collections.abc import Sequence


def split_over_ranks(lengths: Sequence[int], dp_size: int) -> list[list[int]]:
    """Indices of the data each rank works on: longest first, to the rank with the least so far.

    Ties go to the lower rank and the lower index. Ranks may stay empty. Each list is ascending.
    """
    loads = [0] * dp_size
    chosen: list[list[int]] = [[] for _ in range(dp_size)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(dp_size), key=lambda r: (loads[r], r))
        chosen[rank].append(index)
        loads[rank] += lengths[index]
    return [sorted(indices) for indices in chosen]


def pack(indices: Sequence[int], lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Micro-batches of at most `token_budget` tokens, first-fit by decreasing length (within 22 % of optimal).

    A datum longer than the budget gets a micro-batch of its own: the budget is about memory, not about what is legal.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        for place, free in enumerate(room):
            if lengths[index] <= free:
                bins[place].append(index)
                room[place] -= lengths[index]
                break
        else:
            bins.append([index])
            room.append(token_budget - lengths[index])
    return [sorted(members) for members in bins]


def smaller_budget(lengths: Sequence[int], token_budget: int) -> int | None:
    """What to try when micro-batches of `token_budget` did not fit into memory: half of the largest of them.

    None where that would help no more: the largest is a single sequence, which is never cut.
    """
    batches = pack(range(len(lengths)), lengths, token_budget)
    largest = max(sum(lengths[index] for index in members) for members in batches)
    longest = max(lengths)
    return None if largest <= longest else max(largest // 2, longest)
