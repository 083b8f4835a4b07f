"""A GPU that answers everything with an error ends its rank; any other failure is one request's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tinker_hpc.errors import RequestError
from tinker_hpc.worker.ranks import EndWorker, Failure, describe

ILLEGAL = "CUDA error: an illegal memory access was encountered"


class Stream:
    """A GPU's, as far as it is asked."""

    def __init__(self, error: str | None) -> None:
        self.error = error
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        if self.error is not None:
            raise RuntimeError(self.error)
        return True


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, error: str | None = None) -> Stream:
    stream: Any = Stream(error)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    return stream


def test_a_lost_gpu_ends_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, ILLEGAL)
    with pytest.raises(
        EndWorker, match=f"GPU does not answer any more: {ILLEGAL}; .*CUDA error: device-side assert"
    ) as ended:
        describe(RuntimeError("CUDA error: device-side assert triggered"))
    assert ended.value.failure is None, "the request is run again, not failed"


def test_a_gpu_that_answers_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = on_a_gpu(monkeypatch)
    assert describe(RuntimeError("odd")) == Failure("server", "RuntimeError: odd")
    assert stream.asked == 1


@pytest.mark.parametrize("error", [RequestError("bad"), torch.OutOfMemoryError("CUDA out of memory"), OSError(28, "x")])
def test_what_says_nothing_about_the_gpu(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = on_a_gpu(monkeypatch, ILLEGAL)
    assert isinstance(describe(error), Failure)
    assert stream.asked == 0


def test_without_a_gpu() -> None:
    assert describe(RuntimeError("odd")) == Failure("server", "RuntimeError: odd")
