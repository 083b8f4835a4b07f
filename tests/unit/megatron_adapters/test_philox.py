"""Random numbers against the published vectors of Random123, and their statistics."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_adapters.philox import philox4x32, uniform_numbers

# Random123 1.14, tests/kat_vectors: philox4x32, 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = philox4x32(np.array([counter], dtype=np.uint64).T, np.array([key], dtype=np.uint64).T)
    assert words[:, 0].tolist() == expected


def test_number_depends_on_nothing_but_seed_sample_and_step() -> None:
    seeds, samples, steps = [1, 2**63 + 5, -7, 1, 1], [0, 3, 0, 1, 0], [0, 9, 4, 0, 1]
    together = uniform_numbers(seeds, samples, steps)
    alone = [uniform_numbers([a], [b], [c])[0] for a, b, c in zip(seeds, samples, steps, strict=True)]
    assert together.tolist() == alone
    assert len(set(alone)) == 5


def test_negative_seed_is_taken_modulo_two_to_the_64() -> None:
    assert uniform_numbers([-7], [0], [0]) == uniform_numbers([2**64 - 7], [0], [0])


def test_numbers_are_uniform_and_uncorrelated() -> None:
    count = 20_000
    numbers = uniform_numbers([11] * count, [2] * count, range(count))
    assert numbers.min() >= 0 and numbers.max() < 1
    histogram, _ = np.histogram(numbers, bins=20, range=(0, 1))
    chi_squared = ((histogram - count / 20) ** 2 / (count / 20)).sum()
    assert chi_squared < 43.8  # 99.9 % point for 19 degrees of freedom; the seed is fixed, so this cannot flicker
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    other_sample = uniform_numbers([11] * count, [3] * count, range(count))
    assert abs(np.corrcoef(numbers, other_sample)[0, 1]) < 0.03
