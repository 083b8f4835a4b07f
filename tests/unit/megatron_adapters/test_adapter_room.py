"""Adapters that wait on the disk come back to the bit, and those in use never leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapters.adapter_room import AdapterLost, AdapterRoom
from megatron_adapters.adapters import Adapter
from megatron_adapters.interface import AdamParams, Layout
from megatron_adapters.lora_stack import stack_of
from megatron_adapters.optimizer import step_
from megatron_adapters.placement import place_of
from megatron_adapters.projections import Projection

CPU = torch.device("cpu")
PROJECTIONS = [Projection("model.layers.0.self_attn.q_proj", 12, 20, "column"), Projection("lm_head", 12, 30, "column")]


def make(rank: int, seed: int = 0) -> Adapter:
    adapter = Adapter(
        PROJECTIONS,
        rank=rank,
        alpha=32.0,
        targets=("q_proj", "lm_head"),
        per_expert=False,
        layout=Layout(),
        place=place_of(0, Layout()),
        device=CPU,
    )
    adapter.initialize(seed)
    return adapter


def train(adapter: Adapter, seed: int) -> None:
    """A pass's gradients, as autograd adds them, and on even seeds a step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 12, generator=generator)
    pair = adapter.lora.pairs["lm_head"]
    ((x @ pair.a.t() + 0.1) @ pair.b.t()).square().sum().backward()
    adapter.has_gradients = True
    if seed % 2 == 0:
        step_(adapter, AdamParams(learning_rate=1e-2), 1.0)


def state(adapter: Adapter) -> list[torch.Tensor]:
    return [x.clone() for x in (adapter.weights, adapter.grads, adapter.exp_avg, adapter.exp_avg_sq)]


def test_what_was_put_together_stays_the_adapters() -> None:
    """The views that training keeps (lora_stack.py) are of the memory that comes back."""
    room = AdapterRoom(CPU, most_bytes=0)
    adapter, other = make(2), make(2, seed=1)
    room.add("a", adapter)
    stack = stack_of(adapter.lora, ("lm_head",))
    room.add("b", other)
    assert room.is_away("a")
    room.use(["a"])
    adapter.weights.add_(1.0)
    assert torch.equal(stack.a_WI(torch.float32), adapter.lora.pairs["lm_head"].a)
    assert torch.equal(stack.b_RO(torch.float32)[0], adapter.lora.pairs["lm_head"].b.t())
    stack.add_gradient_of_a(torch.ones(3, 2), torch.ones(3, 12))
    assert adapter.grads.sum() == 3 * 2 * 12 * stack.scaling
    room.close()


SIZE = {rank: 16 * make(rank).weights.numel() for rank in (1, 2, 4)}


def test_the_one_used_longest_ago_leaves_and_comes_back() -> None:
    room = AdapterRoom(CPU, most_bytes=2 * SIZE[4])
    adapters = {name: make(4, seed) for seed, name in enumerate("abc")}
    for name in "ab":
        room.add(name, adapters[name])
        train(adapters[name], 2)
        train(adapters[name], 3)  # gradients pending
    before = state(adapters["a"])
    view = adapters["a"].lora.pairs["lm_head"].b
    room.add("c", adapters["c"])
    assert room.is_away("a") and not room.is_away("b") and not room.is_away("c")
    assert adapters["a"].weights.untyped_storage().nbytes() == 0, "the memory is really free"
    assert room.bytes_here == 2 * SIZE[4]
    room.use(["a"])
    assert room.is_away("b") and not room.is_away("a")
    assert all(torch.equal(now, then) for now, then in zip(state(adapters["a"]), before, strict=True))
    assert view is adapters["a"].lora.pairs["lm_head"].b and torch.equal(view, adapters["a"].lora.pairs["lm_head"].b)
    room.close()


def test_all_in_use_stay_whatever_the_bound() -> None:
    room = AdapterRoom(CPU, most_bytes=0)
    adapters = {name: make(2, seed) for seed, name in enumerate("abc")}
    for name, adapter in adapters.items():
        room.add(name, adapter)
    assert [room.is_away(name) for name in "abc"] == [True, True, False]
    room.use(["a", "b"])
    assert [room.is_away(name) for name in "abc"] == [False, False, True]
    room.close()


def test_files_are_private_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    room = AdapterRoom(CPU, most_bytes=0)
    room.add("a", make(1))
    room.add("b", make(1))
    [folder] = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o077 == 0 and len(list(folder.iterdir())) == 1
    room.use(["a"])
    room.remove("b")
    assert not list(folder.iterdir()), "what came back or was dropped leaves no file"
    room.close()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_adapters_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    room = AdapterRoom(CPU, most_bytes=0)
    first = make(1)
    room.add("a", first)
    before = state(first)
    room.add("b", make(1))
    room.add("c", make(1))
    assert not any(room.is_away(name) for name in "abc")
    assert all(torch.equal(now, then) for now, then in zip(state(first), before, strict=True))
    assert capsys.readouterr().err.count("beyond their bound") == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 5)), max_size=25), st.integers(0, 4))
def test_training_with_and_without_a_bound_is_the_same(steps: list[tuple[str, int]], bound: int) -> None:
    room = AdapterRoom(CPU, most_bytes=bound * SIZE[2])
    bounded = {name: make(1 + seed % 3, seed) for seed, name in enumerate("abcd")}
    free = {name: make(1 + seed % 3, seed) for seed, name in enumerate("abcd")}
    for name, adapter in bounded.items():
        room.add(name, adapter)
    for name, seed in steps:
        room.use([name])
        train(bounded[name], seed)
        train(free[name], seed)
    for name in "abcd":
        room.use([name])
        assert bounded[name].step == free[name].step
        for ours, theirs in zip(state(bounded[name]), state(free[name]), strict=True):
            assert torch.equal(ours, theirs)
    room.close()


def put_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[AdapterRoom, Path]:
    """A room whose adapter "a" is in a file in `folder`."""
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    room = AdapterRoom(CPU, most_bytes=0)
    room.add("a", make(2))
    room.add("b", make(2))
    [file] = folder.glob("*/*")
    return room, file


@pytest.mark.parametrize("what", ["gone", "cut short"])
def test_an_adapter_that_cannot_be_read_is_never_used(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, file = put_away(tmp_path, monkeypatch)
    if what == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-4])
    for _ in range(2):  # also the second time
        with pytest.raises(AdapterLost, match="adapter 'a' was put away"):
            room.use(["a"])
        assert room.is_away("a")
    assert not issubclass(AdapterLost, Exception), "no request's failure: it ends the rank"
    room.close()


def test_one_that_cannot_be_read_is_dropped_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room, file = put_away(tmp_path, monkeypatch)
    file.unlink()
    replacement = make(2, seed=5)
    room.add("a", replacement)
    room.use(["a"])
    assert torch.equal(replacement.weights, make(2, seed=5).weights) and room.is_away("b")
    [file] = tmp_path.glob("*/*")
    file.unlink()
    room.remove("b")
    assert not room.is_away("b")
    room.close()


def test_what_finds_no_room_stays_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room, _ = put_away(tmp_path, monkeypatch)
    adapter, resize = room._adapters["a"], torch.UntypedStorage.resize_
    before = make(2).weights

    def too_much(storage: torch.UntypedStorage, size: int) -> None:
        if size and storage.data_ptr() == adapter.exp_avg.untyped_storage().data_ptr():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        resize(storage, size)

    with monkeypatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "resize_", too_much)
        with pytest.raises(RuntimeError, match="allocate"):
            room.use(["a"])
    assert room.is_away("a") and adapter.weights.untyped_storage().nbytes() == 0
    room.use(["a"])
    assert torch.equal(adapter.weights, before)
    room.close()


def test_a_gpus_adapters_wait_in_memory_that_is_not_pinned() -> None:
    """Tensors here stand for a GPU's: without one there is no pinned memory either."""
    room = AdapterRoom(torch.device("cuda"), most_bytes=0)
    adapter = make(1)
    train(adapter, seed=2)
    before = state(adapter)
    room.add("a", adapter)
    room.add("b", make(1))
    assert room.is_away("a")
    room.use(["a"])
    assert all(torch.equal(now, then) for now, then in zip(state(adapter), before, strict=True))
    room.close()


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: out of memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_full_host_memory_leaves_adapters_on_the_gpu(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU's room on the CPU: the tensors are here, the device's name and the allocator's failure are CUDA's."""
    room = AdapterRoom(torch.device("cuda"), most_bytes=0)
    first, to = make(1), torch.Tensor.to
    before = state(first)

    def no_copy(tensor: torch.Tensor, *where: object, copy: bool = False, **options: object) -> torch.Tensor:
        if copy:
            raise error
        return to(tensor, *where, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch.Tensor, "to", no_copy)
    room.add("a", first)
    room.add("b", make(1))
    assert not room.is_away("a")
    assert all(torch.equal(now, then) for now, then in zip(state(first), before, strict=True))
    assert capsys.readouterr().err.count("beyond their bound") == 1
    error.args = ("CUDA error: an illegal memory access was encountered",)
    if type(error) is not torch.OutOfMemoryError:
        with pytest.raises(type(error), match="illegal"):
            room.use(["b"])
    room.close()
