"""Zeroed host memory in pages of 2 MiB where Linux has them.

A decode step on a CPU reads all cached keys and values once, and in pages of 4 KiB every page is a walk through the
page tables, of a virtual machine through two of them: attention of 32 lanes x 96 tokens x 12 layers took 10.7 ms, in
huge pages 8.9 ms (one thread of an Intel Xeon, CPU time). Many distributions give huge pages only to who asks
(Documentation/admin-guide/mm/transhuge.rst of the kernel: `madvise`).
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_HUGE_PAGE = 2**21


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """torch.zeros on the CPU; memory becomes resident only as it is written to.

    Raises: MemoryError where the process may not have that much.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(*shape, dtype=dtype)
    try:
        # One more, to begin where a huge page may: addresses, no memory. Private, since what is shared (mmap's default)
        # is a file in memory, to which another setting applies (`shmem_enabled`, most often `never`).
        room = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{num_bytes} bytes of zeros: {error}") from error
    offset = -torch.frombuffer(room, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without them
        # Whole ones alone: the last would take more memory than was asked for.
        room.madvise(mmap.MADV_HUGEPAGE, offset, num_bytes // _HUGE_PAGE * _HUGE_PAGE)
    # The tensor holds the buffer, and the buffer its mapping: it is unmapped with the last view.
    return torch.frombuffer(room, dtype=dtype, count=math.prod(shape), offset=offset).view(*shape)
