"""Zeros in huge pages: zeros, where a huge page may begin, writable, and given back with their last view."""

from __future__ import annotations

import gc
import re
import resource
from pathlib import Path

import pytest
import torch

from megatron_adapters import huge_pages
from megatron_adapters.out_of_memory import is_out_of_memory

MIB = 2**20


def mapped_mib() -> int:
    """Of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() // MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 4, 64, 8), (3, 4, 64, 8), (33, 4, 100, 128)], ids=str)
def test_they_are_zeros_to_write_to(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = huge_pages.zeros(shape, dtype)
    assert x.shape == shape and x.dtype == dtype and x.is_contiguous()
    assert torch.equal(x, torch.zeros(shape, dtype=dtype))
    x += 1
    assert torch.equal(x, torch.ones(shape, dtype=dtype))


def test_large_ones_begin_at_a_huge_page() -> None:
    assert huge_pages.zeros((64, MIB), torch.uint8).data_ptr() % (2 * MIB) == 0


def huge_kib(address: int) -> int:
    """Of the mapping that an address is in: AnonHugePages of proc_pid_smaps(5)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    raise AssertionError(f"no mapping holds {address:x}")


def test_they_are_huge_pages() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip(f"this kernel gives no huge pages; to have them: echo madvise > {setting}")
    x = huge_pages.zeros((64, MIB), torch.uint8)
    x += 1
    assert huge_kib(x.data_ptr()) >= 32 * 1024, "as many as the kernel had free"


def test_they_are_given_back_with_their_last_view() -> None:
    gc.collect()
    before = mapped_mib()
    x = huge_pages.zeros((64, 32 * MIB), torch.uint8)
    view = x[3]
    del x
    gc.collect()
    assert mapped_mib() - before > 2000 and not view[::4096].any()
    del view
    gc.collect()
    assert mapped_mib() - before < 1000


def test_too_much_is_known_as_a_want_of_memory() -> None:
    with pytest.raises(MemoryError, match="bytes of zeros") as caught:
        huge_pages.zeros((2**60,), torch.uint8)
    assert is_out_of_memory(caught.value)
