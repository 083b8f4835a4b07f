"""A base model and an adapter -> one Hugging Face model folder with the adapter added into the weights.

W + (alpha / rank) * B A for every adapted matrix, in float32, then rounded to the dtype the base is stored in; every
other tensor is copied byte for byte. Shards keep their names. A block of rows, or an expert, is in memory at a time,
whatever the model's size, and neither torch nor a GPU is needed. A base in FP8 or MXFP4 is merged into bfloat16, whole.

Experts: each is a matrix of its own in the base, or (gpt-oss) a part of one tensor [experts, in, out] for all, gate and
up taking turns in the last dimension; the adapter may hold them one by one (experts.7.gate_proj) or stacked
(experts.w1: gate, w3: up, w2: down), where a stack of one is shared by all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinker_hpc.errors import ConfigError, DataRootError, WeightsError
from tinker_hpc.model_folder import HUB_FILES, INDEX
from tinker_hpc.model_tensors import ModelTensors
from tinker_hpc.safetensors_file import TensorFile, as_bytes, num_bytes, write_tensors

EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
_STACKS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_EXPERT = re.compile(r"(?P<block>.*\.experts)\.(?P<expert>\d+)\.(?P<name>gate_proj|up_proj|down_proj)")
_FUSED = re.compile(r"(?P<block>.*\.experts)\.(?P<name>gate_up_proj|down_proj)")
_FUSED_PARTS = {
    "gate_up_proj": (("gate_proj", slice(0, None, 2)), ("up_proj", slice(1, None, 2))),
    "down_proj": (("down_proj", slice(None)),),
}
"""which columns of a fused tensor are which matrix"""


@dataclass(frozen=True)
class _Factors:
    """Names of a matrix's A and B in the adapter's file, and the expert's place in a stack (None: not stacked)."""

    a: str
    b: str
    expert: int | None = None


@dataclass(frozen=True)
class _Patch:
    """A and B, and to what of the tensor their product is added: all of it, or columns of an entry, transposed."""

    factors: _Factors
    entry: int | None = None
    columns: slice | None = None


class AdapterFile:
    """The matrices of an adapter's folder (PEFT's names)."""

    def __init__(self, folder: Path) -> None:
        """Raises: WeightsError if the folder holds no plain LoRA adapter."""
        try:
            config = json.loads((folder / "adapter_config.json").read_text())
            self.scaling = config["lora_alpha"] / config["r"]
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise WeightsError(f"{folder / 'adapter_config.json'} is not a LoRA configuration: {error!r}.") from error
        self._file = TensorFile(folder / "adapter_model.safetensors")
        self.unused = {name for name in self._file.tensors if name.endswith(".lora_A.weight")}
        """A matrices that no tensor of the base has asked for yet."""

    def close(self) -> None:
        self._file.__exit__()

    def factors(self, tensor_name: str) -> _Factors | None:
        """The A and B of the base's tensor of that name; None if it is not adapted."""
        path = tensor_name.removesuffix(".weight")
        expert = _EXPERT.fullmatch(path)
        candidates = [_Factors(_key(path, "A"), _key(path, "B"))]
        if expert:
            stack = f"{expert['block']}.{_STACKS[expert['name']]}"
            candidates.append(_Factors(_key(stack, "A"), _key(stack, "B"), int(expert["expert"])))
        found = next((c for c in candidates if c.a in self._file.tensors and c.b in self._file.tensors), None)
        if found:
            self.unused.discard(found.a)
        return found

    def check(self, factors: _Factors, name: str, shape: tuple[int, ...]) -> None:
        """Raises: WeightsError if A and B do not make a matrix of this shape."""
        a, b = (self._file.tensors[key].shape[-2:] for key in (factors.a, factors.b))
        if len(shape) != 2 or (b[0], a[1]) != shape or a[0] != b[1]:
            raise WeightsError(
                f"{name} is {list(shape)}, but the adapter's A is {list(a)} and B {list(b)}. Is it another base model?"
            )

    def whole(self, factors: _Factors) -> tuple[np.ndarray, np.ndarray]:
        """(scaling * A, B) in float32."""
        a, b = (self._matrix(key, factors.expert) for key in (factors.a, factors.b))
        return a * np.float32(self.scaling), b

    def _matrix(self, key: str, expert: int | None) -> np.ndarray:
        if expert is None:
            return self._file.read(key)
        place = 0 if self._file.tensors[key].shape[0] == 1 else expert
        return self._file.read(key, slice(place, place + 1))[0]


def export_merged(
    base_folder: Path, adapter_folder: Path, target: Path, *, written: Callable[[int, int], None] | None = None
) -> Path:
    """Write the merged model to `target`, a new folder that transformers and vLLM load as it is.

    A base whose unembedding is its embedding gets one of its own where the adapter trains it.

    Args: written: told the bytes of weights that are written, and those in all, now and then.

    Raises: ConfigError if `target` exists; WeightsError if base and adapter do not belong together; DataRootError if
        the disk refuses. Nothing is left behind.
    """
    if target.exists():
        raise ConfigError(f"{target} exists already; name a folder that does not, nothing is overwritten.")
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        _merge_into(unfinished, base_folder, adapter_folder, written or (lambda done, total: None))
        unfinished.rename(target)
    except OSError as error:
        raise DataRootError(
            f"cannot write {target}: {error.strerror}. Choose a folder with room that you may write to.",
            path=str(target),
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _merge_into(folder: Path, base_folder: Path, adapter_folder: Path, written: Callable[[int, int], None]) -> None:
    with closing(AdapterFile(adapter_folder)) as adapter, ModelTensors(base_folder) as base:
        untied = UNEMBEDDING not in base.stored and adapter.factors(UNEMBEDDING) is not None
        sources = {name: name for name in base.stored} | ({UNEMBEDDING: EMBEDDING} if untied else {})
        patches = {name: _patches(adapter, name, base.shape(source)) for name, source in sources.items()}
        if adapter.unused:  # before anything is written
            some = ", ".join(sorted(adapter.unused)[:4])
            raise WeightsError(
                f"the adapter has matrices for which {base_folder} has none, {len(adapter.unused)} in all: {some}. "
                "Give the base model it was trained on."
            )
        where: dict[str, str] = {}
        total = sum(num_bytes(base.dtype(source), base.shape(source)) for source in sources.values())
        done = 0

        def counted(pieces: Iterator[bytes]) -> Iterator[bytes]:
            nonlocal done
            for piece in pieces:
                yield piece
                done += len(piece)
                written(done, total)

        for shard in base.shards:
            here = {name: source for name, source in sources.items() if base.shard(source) is shard}
            entries = {}
            for name in sorted(here, key=lambda n: (base.place(here[n]), n)):
                dtype, shape = base.dtype(here[name]), base.shape(here[name])
                entries[name] = (dtype, shape, counted(_pieces(base, here[name], adapter, patches[name])))
                where[name] = shard.path.name
            if here:
                write_tensors(folder / shard.path.name, entries, shard.metadata or {"format": "pt"})
        changes = {"tie_word_embeddings": False} if untied else {}
        _copy_other_files(base_folder, folder, changes, drop={"quantization_config"} if base.is_quantised else set())
    if (base_folder / INDEX).exists():
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _patches(adapter: AdapterFile, name: str, shape: tuple[int, ...]) -> list[_Patch]:
    """What the adapter adds to a tensor. Raises: WeightsError where it does not fit."""
    fused = _FUSED.fullmatch(name)
    if fused is None or len(shape) != 3:
        factors = adapter.factors(name)
        if factors is None:
            return []
        adapter.check(factors, name, shape)
        return [_Patch(factors)]
    patches = []
    num_experts, d_in, width = shape
    for expert in range(num_experts):
        for part, columns in _FUSED_PARTS[fused["name"]]:
            if factors := adapter.factors(f"{fused['block']}.{expert}.{part}.weight"):
                adapter.check(factors, f"{part} of {name}", (len(range(width)[columns]), d_in))
                patches.append(_Patch(factors, expert, columns))
    return patches


def _pieces(base: ModelTensors, source: str, adapter: AdapterFile, patches: list[_Patch]) -> Iterator[bytes]:
    """The bytes of one tensor of the merged model."""
    if not patches and base.stored[source].scales is None:
        yield from base.shard(source).blocks(source)
        return
    whole = adapter.whole(patches[0].factors) if patches and patches[0].entry is None else None
    for rows in base.row_blocks(source):
        values = base.read(source, rows)
        if whole is not None:
            scaled_a, b = whole
            values += b[rows] @ scaled_a
        for patch in patches:
            if patch.entry is not None and rows.start <= patch.entry < rows.stop:
                scaled_a, b = adapter.whole(patch.factors)
                values[patch.entry - rows.start][:, patch.columns] += (b @ scaled_a).T
        yield as_bytes(values, base.dtype(source))


def _copy_other_files(base_folder: Path, folder: Path, changes: dict[str, Any], drop: set[str]) -> None:
    """Configuration and tokenizer; `changes` to config.json, and what is no longer true of it."""
    for pattern in HUB_FILES:
        for path in base_folder.glob(pattern):
            if path.suffix != ".safetensors" and path.name != INDEX:
                shutil.copyfile(path, folder / path.name)
    if changes or drop:
        config = json.loads((folder / "config.json").read_text())
        kept = {key: value for key, value in config.items() if key not in drop}
        (folder / "config.json").write_text(json.dumps(kept | changes, indent=2) + "\n")


def _key(path: str, letter: str) -> str:
    return f"base_model.model.{path}.lora_{letter}.weight"
