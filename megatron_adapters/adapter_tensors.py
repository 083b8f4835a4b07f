"""Reading an adapter's file: canonical names and slices, whichever of two ways its experts are stored.

stacked      model.layers.0.mlp.experts.w1.lora_A   [1 or E, rank, d_in], w1 gate, w3 up, w2 down: what we write, and
             what Tinker's own checkpoints hold, so that tinker-cookbook's `weights` reads it
per expert   model.layers.0.mlp.experts.7.gate_proj.lora_A   [rank, d_in] for every expert: what peft and vLLM load, and
             tinker_hpc/peft_experts.py exports. A factor shared by all experts is then repeated; the file's metadata
             says so, since equal matrices alone may be a coincidence (all B are zero at the start).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinker_hpc.errors import WeightsError
from tinker_hpc.peft_experts import SHARED_OUTER, SHARING

from .projections import EXPERT_NAMES

_PER_EXPERT = re.compile(
    r"(?P<before>.*\.mlp\.experts\.)(?P<expert>\d+)\.(?P<name>\w+_proj)\.(?P<after>lora_[AB]\.weight.*)"
)


class AdapterTensors:
    """An open adapter_model.safetensors (or optimizer.safetensors). Use it as a context manager.

    Raises: WeightsError if the file is missing or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file: Any = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise WeightsError(
                f"cannot read {path}: {error}. Give a folder that a save of this kind completed."
            ) from error
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self._stacks: dict[str, dict[int, str]] = {}
        self._plain: list[str] = []
        for key in self._file.keys():  # noqa: SIM118
            match = _PER_EXPERT.fullmatch(key)
            if match and match["name"] in EXPERT_NAMES:
                canonical = f"{match['before']}{EXPERT_NAMES[match['name']]}.{match['after']}"
                self._stacks.setdefault(canonical, {})[int(match["expert"])] = key
            else:
                self._plain.append(key)

    def __enter__(self) -> AdapterTensors:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> full shape."""
        shapes = {key: self._shape(key) for key in self._plain}
        for key, experts in self._stacks.items():
            if sorted(experts) != list(range(len(experts))):
                raise WeightsError(f"{key}: the file holds experts {sorted(experts)}, expected 0 to {max(experts)}.")
            of_expert = {self._shape(name) for name in experts.values()}
            if len(of_expert) > 1:
                raise WeightsError(f"{key}: experts have different shapes, {sorted(of_expert)}.")
            shapes[key] = (1 if self._is_shared(key) else len(experts), *of_expert.pop())
        return shapes

    def read(self, key: str, index: tuple[slice, ...] = ()) -> Tensor:
        """A slice of a canonical tensor; only that is read from disk."""
        if key not in self._stacks:
            return self._file.get_slice(key)[index] if index else self._file.get_tensor(key)
        experts = self._stacks[key]
        count = 1 if self._is_shared(key) else len(experts)
        wanted = range(count)[index[0]] if index else range(count)
        return torch.stack([self._file.get_tensor(experts[expert]) for expert in wanted])

    def _shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(key).get_shape())

    def _is_shared(self, key: str) -> bool:
        outer = ".w2.lora_B." in key or ".w1.lora_A." in key or ".w3.lora_A." in key
        return outer and self.metadata.get(SHARING) == SHARED_OUTER
