"""Which errors say that a device's memory, or on CPU the process's, was not enough; and getting it back afterwards."""

from __future__ import annotations

import gc

import torch

_WORDS = (
    "can't allocate memory",  # torch's allocator on CPU: a RuntimeError "DefaultCPUAllocator: can't allocate memory"
    "not enough memory",  # the same on other systems
    "CUBLAS_STATUS_ALLOC_FAILED",  # cuBLAS allocates its workspace itself
    "CUDA error: out of memory",  # torch.AcceleratorError: a kernel loaded at its first use
    "CUDA driver error: out of memory",  # the allocator's expandable segments
    "CUDA out of memory",  # torch.OutOfMemoryError that came over from another rank as a RuntimeError
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller piece of the same work may fit.

    Not NCCL's own lack of memory: its communicators are broken then, and all ranks have to start again.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def give_memory_back() -> None:
    """After such an error has been handled: what its traceback held on to is free, and the allocator's pieces too."""
    gc.collect()  # the error, its traceback and the frame that caught it are a cycle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
