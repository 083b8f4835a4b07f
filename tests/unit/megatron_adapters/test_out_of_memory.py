"""What counts as too little memory: torch's own classes, and the words of errors that have none."""

from __future__ import annotations

import pytest
import torch

from megatron_adapters.out_of_memory import is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
    ids=str,
)
def test_too_little_memory(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_torchs_own_words() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**61, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.distributed.DistBackendError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("CUDA error: out of memory"),
    ],
    ids=str,
)
def test_everything_else(error: Exception) -> None:
    assert not is_out_of_memory(error)
