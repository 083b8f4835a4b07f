"""Random numbers without a state: a uniform number is a pure function of (seed, sample index, step).

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11 (the constants
are those of its reference implementation, Random123). A token drawn with such a number does not depend on which other
requests share its batch, on the layout, or on what was drawn before; the same seed gives the same numbers everywhere.

Shapes: B rows of a batch, 4 words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))  # key increments: golden ratio and sqrt(3) - 1
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox4x32(counter_4B: U64, key_2B: U64) -> U64:
    """Ten rounds of the Philox bijection.

    Args:
        counter_4B: uint64 [4, B], each word below 2**32.
        key_2B: uint64 [2, B], each word below 2**32.
    Returns: uint64 [4, B], each word below 2**32.
    """
    c0, c1, c2, c3 = counter_4B
    k0, k1 = key_2B
    for _ in range(_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (product_1 >> _32) ^ c1 ^ k0, product_1 & _LOW, (product_0 >> _32) ^ c3 ^ k1, product_0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3])


def uniform_numbers(
    seeds: Sequence[int], sample_indices: Sequence[int], steps: Sequence[int], *, stream: int = 0
) -> npt.NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits for each row.

    Args:
        seeds: the request's seed, any integer (taken modulo 2**64): the key.
        sample_indices: which of the request's samples, below 2**32. steps: how many tokens came before, below 2**32.
            Together the counter, with `stream`: numbers for another purpose than the sampled tokens.
    Returns: float64 [B].
    """
    seed_B = np.asarray([seed % 2**64 for seed in seeds], dtype=np.uint64)
    step_B = np.asarray(steps, dtype=np.uint64)
    counter_4B = np.zeros((4, len(seed_B)), dtype=np.uint64)
    counter_4B[0], counter_4B[1] = step_B, np.asarray(sample_indices, dtype=np.uint64)
    counter_4B[2] = stream
    words_4B = philox4x32(counter_4B, np.stack([seed_B & _LOW, seed_B >> _32]))
    high_27, low_26 = words_4B[0] >> np.uint64(5), words_4B[1] >> np.uint64(6)
    return (high_27 * 2.0**26 + low_26) * 2.0**-53
