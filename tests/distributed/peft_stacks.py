"""peft's own way to hold the experts' matrices of a mixture of experts, read and written by the names Tinker uses.

peft (0.21) fuses the adapters of all experts of a layer: A as [experts * rank, in] with the expert slowest, B as
[out, rank * experts] with the expert fastest (its ParamWrapper), gate and up in one block-diagonal pair of rank 2r.
Stacked: w1 (gate), w3 (up), w2 (down), A [E, rank, in], B [E, out, rank]; where all experts share a factor, [1, ...].

Everything here imports nothing of ours: it is the independent side of the parity tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

SHARED = {("w1", "A"), ("w3", "A"), ("w2", "B")}
_EXPERTS = re.compile(r"(.*\.mlp\.experts\.)(base_layer\.)?lora_([AB])\.default\.weight")
HF_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class PeftParameters:
    """The trainable parameters of a PeftModel by canonical name.

    shared: sum gradients over experts, and write one matrix to all, for the factors that "shared-outer" shares.
    """

    def __init__(self, model: Any, num_experts: int, *, shared: bool, interleaved: bool = False) -> None:
        """interleaved: gate and up take turns in the fused matrix (gpt-oss), else gate comes first."""
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.num_experts = num_experts
        self.shared = shared
        self.interleaved = interleaved

    def values(self) -> dict[str, Tensor]:
        return {key: self._joined(key, view.detach()).clone() for key, view in self._views(lambda p: p.data)}

    def grads(self) -> dict[str, Tensor]:
        found = {}
        for key, view in self._views(lambda p: p.grad):
            found[key] = view.sum(0, keepdim=True) if self._is_shared(key) else view.clone()
        return found

    @torch.no_grad()
    def write(self, values: dict[str, Tensor]) -> None:
        for key, view in self._views(lambda p: p.data):
            view.copy_(values[key])  # a shared factor is broadcast over the experts

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def _views(self, part: Any) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and a view into peft's tensor (or its gradient)."""
        for name, parameter in self.parameters.items():
            tensor = part(parameter)
            match = _EXPERTS.fullmatch(name)
            if match is None:
                yield name.replace(".default", ""), tensor
                continue
            prefix, is_gate_up, letter = match.groups()
            if letter == "A":
                stack = tensor.view(self.num_experts, -1, tensor.shape[1])
            else:
                stack = tensor.view(tensor.shape[0], -1, self.num_experts).permute(2, 0, 1)
            if not is_gate_up:
                yield f"{prefix}w2.lora_{letter}.weight", stack
            elif letter == "A":
                for key, block in zip(("w1", "w3"), stack.chunk(2, dim=1), strict=True):
                    yield f"{prefix}{key}.lora_A.weight", block
            else:
                rank, width = stack.shape[2] // 2, stack.shape[1] // 2
                rows = (
                    (slice(0, None, 2), slice(1, None, 2)) if self.interleaved else (slice(width), slice(width, None))
                )
                yield f"{prefix}w1.lora_B.weight", stack[:, rows[0], :rank]
                yield f"{prefix}w3.lora_B.weight", stack[:, rows[1], rank:]

    def _is_shared(self, key: str) -> bool:
        parts = key.split(".")
        return self.shared and ".experts." in key and (parts[-3], parts[-2][-1]) in SHARED

    def _joined(self, key: str, stack: Tensor) -> Tensor:
        return stack[:1] if self._is_shared(key) else stack


def random_adapter(
    model: Any, rank: int, num_experts: int, generator: torch.Generator, *, shared: bool
) -> dict[str, Tensor]:
    """Per-expert PEFT tensors (2-D) for every expert of a transformers model; the attention is peft's to make."""
    tensors = {}
    for name, experts in model.named_modules():
        if not name.endswith(".mlp.experts"):
            continue
        hidden, ffn = experts.down_proj.shape[1:]
        for key, (d_out, d_in) in {"w1": (ffn, hidden), "w3": (ffn, hidden), "w2": (hidden, ffn)}.items():
            for letter, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
                count = 1 if shared and (key, letter) in SHARED else num_experts
                stack = (torch.randn(count, *shape, generator=generator) * 0.05).expand(num_experts, *shape)
                for expert in range(num_experts):
                    path = f"base_model.model.{name}.{expert}.{HF_NAMES[key]}.lora_{letter}.weight"
                    tensors[path] = stack[expert].clone()
    return tensors
