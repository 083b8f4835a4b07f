"""Where idle adapters wait: their training state leaves the device, and comes back to the bit when it is asked for.

An adapter in training costs 16 bytes a parameter (weights, gradients, Adam's moments). Beyond a bound, those used
longest ago are put away: from a GPU into host memory, from a CPU's memory onto the node's own disk. The tensors
stay the same objects and lose only their storage, so nothing that refers to them has to be made anew. Sampling
snapshots are not touched: they are copies (adapters.py).
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .adapters import Adapter
from .free_memory import free_memory
from .out_of_memory import is_out_of_memory

SHARE = 0.25
"""Of a GPU's memory, or of the memory free to this node's or job's processes and divided among its ranks, for the
training state of all adapters: one of rank 32 for an 8B model is 1.4 GiB."""

_PIECE = 2**22
"""Numbers copied at a time on their way to the disk."""


class AdapterLost(BaseException):
    """An adapter's state cannot be read back. Its weights are nowhere else on this rank, so no request can be right any
    more: this ends the rank as KeyboardInterrupt would (`except Exception` lets it pass), and whoever starts it again
    restores the adapter.
    """


class _Away(Protocol):
    """The buffers of an adapter that was put away, those worth keeping, in order."""

    def read(self) -> list[Tensor]:
        """Raises: OSError if they are not there any more."""
        ...

    def forget(self) -> None: ...


class AdapterRoom:
    """The adapters' memory on one rank. Ranks may decide differently: nothing here communicates.

    Attributes: most_bytes: of training state on the device, all adapters together, but for those in use at once.
    """

    def __init__(self, device: torch.device, most_bytes: int) -> None:
        self.device = device
        self.most_bytes = most_bytes
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()  # most recently used last
        self._away: dict[str, _Away] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._said = False

    @property
    def bytes_here(self) -> int:
        """Of training state on the device now."""
        return sum(_num_bytes(adapter) for key, adapter in self._adapters.items() if key not in self._away)

    def is_away(self, adapter_id: str) -> bool:
        return adapter_id in self._away

    def add(self, adapter_id: str, adapter: Adapter) -> None:
        """A new adapter, or a replacement; it is in use."""
        self.remove(adapter_id)
        self._adapters[adapter_id] = adapter
        self.use([adapter_id])

    def remove(self, adapter_id: str) -> None:
        """Forget an adapter, wherever it is."""
        self._adapters.pop(adapter_id, None)
        if adapter_id in self._away:
            self._away.pop(adapter_id).forget()

    def use(self, adapter_ids: Collection[str]) -> None:
        """See to it that all of these are on the device, and put others away until the rest fits.

        Raises: AdapterLost; what the allocator raises, and then what was away still is.
        """
        for adapter_id in adapter_ids:
            self._adapters.move_to_end(adapter_id)
        wanted = sum(_num_bytes(self._adapters[key]) for key in adapter_ids if key in self._away)
        for adapter_id in list(self._adapters):  # first out, then in: both at once may not fit
            if self.bytes_here + wanted <= self.most_bytes:
                break
            if adapter_id not in adapter_ids and adapter_id not in self._away:
                self._put_away(adapter_id)
        for adapter_id in adapter_ids:
            if adapter_id in self._away:
                self._bring_back(adapter_id)

    def close(self) -> None:
        """Forget everything, files included."""
        for adapter_id in list(self._adapters):
            self.remove(adapter_id)
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    @torch.no_grad()
    def _put_away(self, adapter_id: str) -> None:
        kept = _worth_keeping(self._adapters[adapter_id])
        try:
            self._away[adapter_id] = _to_host(kept) if self.device.type == "cuda" else self._to_disk(kept)
        except (OSError, RuntimeError, MemoryError) as error:
            if not isinstance(error, OSError) and not is_out_of_memory(error):
                raise
            if not self._said:  # over the bound is better than a request that fails for another's sake
                print(f"adapters stay on the device beyond their bound: {error}", file=sys.stderr, flush=True)
            self._said = True
            return
        for buffer in _buffers(self._adapters[adapter_id]):
            buffer.untyped_storage().resize_(0)

    @torch.no_grad()
    def _bring_back(self, adapter_id: str) -> None:
        adapter = self._adapters[adapter_id]
        try:
            saved = self._away[adapter_id].read()
        except OSError as error:
            raise AdapterLost(
                f"adapter {adapter_id!r} was put away to make room and cannot be read back: {error}. If TMPDIR is "
                "cleaned while jobs run, point it elsewhere."
            ) from error
        try:
            for buffer in _buffers(adapter):
                buffer.untyped_storage().resize_(buffer.numel() * buffer.element_size())
        except (RuntimeError, MemoryError):  # no room for all of them: it stays away
            for buffer in _buffers(adapter):
                buffer.untyped_storage().resize_(0)
            raise
        kept = _worth_keeping(adapter)
        for buffer in _buffers(adapter):
            if not any(buffer is other for other in kept):
                buffer.zero_()
        for buffer, values in zip(kept, saved, strict=True):
            buffer.copy_(values)
        self._away.pop(adapter_id).forget()

    def _to_disk(self, buffers: list[Tensor]) -> _OnDisk:
        if self._folder is None:  # private (0700), on the node's own disk where TMPDIR is
            self._folder = tempfile.TemporaryDirectory(prefix="tinker_hpc-adapters-", ignore_cleanup_errors=True)
        with tempfile.NamedTemporaryFile(dir=self._folder.name, delete=False) as file:
            path = Path(file.name)
            try:
                for buffer in buffers:
                    for piece in buffer.split(_PIECE):
                        piece.clone().numpy().tofile(file)  # a storage that numpy has seen can never be resized
                file.flush()
            except OSError:
                path.unlink(missing_ok=True)
                raise
        return _OnDisk(path, [buffer.numel() for buffer in buffers])


class _OnDisk(NamedTuple):
    path: Path
    sizes: list[int]

    def read(self) -> list[Tensor]:
        flat = np.fromfile(self.path, np.float32)
        if flat.size != sum(self.sizes):
            raise OSError(f"{self.path} holds {flat.size} numbers, {sum(self.sizes)} were written")
        return list(torch.from_numpy(flat).split(self.sizes))

    def forget(self) -> None:
        with contextlib.suppress(OSError):  # gone already, or left for the folder's end
            self.path.unlink()


class _OnHost(NamedTuple):
    copies: list[Tensor]

    def read(self) -> list[Tensor]:
        return self.copies

    def forget(self) -> None:
        """They go with this object."""


def memory_for_adapters(device: torch.device) -> int:
    """Bytes of training state this rank may have on its device."""
    if device.type == "cuda":
        return int(SHARE * torch.cuda.mem_get_info(device)[1])
    return int(SHARE * free_memory(device))


def _to_host(buffers: list[Tensor]) -> _OnHost:
    """Not pinned: torch rounds each piece of pinned memory up to a power of two and keeps what is freed."""
    return _OnHost([buffer.to("cpu", copy=True) for buffer in buffers])


def _buffers(adapter: Adapter) -> tuple[Tensor, ...]:
    return adapter.weights, adapter.grads, adapter.exp_avg, adapter.exp_avg_sq


def _worth_keeping(adapter: Adapter) -> list[Tensor]:
    """The others are zero."""
    kept = [adapter.weights]
    if adapter.has_gradients:
        kept.append(adapter.grads)
    if adapter.step:
        kept += [adapter.exp_avg, adapter.exp_avg_sq]
    return kept


def _num_bytes(adapter: Adapter) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in _buffers(adapter))
