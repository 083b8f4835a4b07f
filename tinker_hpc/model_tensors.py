"""The tensors of a model's folder as the model has them, a few rows at a time: with numpy alone, quantised ones too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tinker_hpc import quantised, safetensors_file
from tinker_hpc.errors import WeightsError
from tinker_hpc.model_folder import weight_files
from tinker_hpc.safetensors_file import TensorFile


class ModelTensors:
    """A folder with model.safetensors, or with shards and their index; use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Raises: WeightsError if a file cannot be read, or ConfigError for a quantisation that is not."""
        self.folder = folder
        self.shards: list[TensorFile] = []
        try:
            for path in weight_files(folder):
                self.shards.append(TensorFile(path))
            self._block = quantised.fp8_block(_config(folder), str(folder / "config.json"))
            self._shard_of = {name: shard for shard in self.shards for name in shard.tensors}
            infos = {name: shard.tensors[name] for name, shard in self._shard_of.items()}
            found = {name: (info.dtype, info.shape) for name, info in infos.items()}
            self.stored = quantised.as_the_model_has_them(found, self._block, str(folder))
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> ModelTensors:
        return self

    def __exit__(self, *error: Any) -> None:
        for shard in self.shards:
            shard.__exit__()

    @property
    def is_quantised(self) -> bool:
        return any(stored.scales for stored in self.stored.values())

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored[name].shape

    def dtype(self, name: str) -> str:
        """safetensors' word for what the tensor is written as: what it is stored as, or bfloat16 if it is quantised."""
        stored = self.stored[name]
        return "BF16" if stored.scales else self._shard_of[stored.numbers].tensors[stored.numbers].dtype

    def shard(self, name: str) -> TensorFile:
        """The file that holds it."""
        return self._shard_of[self.stored[name].numbers]

    def place(self, name: str) -> int:
        """Where its bytes begin in that file."""
        return self.shard(name).tensors[self.stored[name].numbers].begin

    def row_blocks(self, name: str) -> Iterator[slice]:
        """Ranges of the first dimension of about BLOCK_BYTES as float32, or one by one."""
        num, *rest = self.shape(name)
        step = max(1, safetensors_file.BLOCK_BYTES // (4 * max(1, int(np.prod(rest, dtype=np.int64)))))
        for first in range(0, num, step):
            yield slice(first, min(first + step, num))

    def read(self, name: str, rows: slice) -> np.ndarray:
        """These rows of the first dimension as float32; only they are read."""
        stored = self.stored[name]
        shard = self._shard_of[stored.numbers]
        if stored.scales is None:
            return shard.read(name, rows)
        codes, scales = shard.codes(stored.numbers, rows), self._shard_of[stored.scales]
        if stored.is_mxfp4:
            return quantised.mxfp4_values(codes, scales.codes(stored.scales, rows)).swapaxes(1, 2)
        assert self._block is not None
        blocks, first = quantised.touched(rows.start, rows.stop, self._block[0])
        return quantised.fp8_values(codes, scales.read(stored.scales, blocks), self._block, (first, 0))


def _config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read {folder / 'config.json'}: {error}. Give a Hugging Face model.") from error
