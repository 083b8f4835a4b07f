"""A model's folder -> the same model stored as its publisher stores it: gpt-oss in MXFP4, DeepSeek-V3 in FP8.

A quantiser of our own, straight from the formats' definitions (tinker_hpc/quantised.py names them). The tensors lie in
two files, so that numbers and their factors are apart, as they are at the border of a published shard.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E4M3_MAX = 448.0
KEPT = ("embed_tokens", "lm_head", "norm", ".gate.")
"""what DeepSeek leaves as it is"""


def write_mxfp4(model: Path, target: Path) -> Path:
    """The experts' matrices become `_blocks` and `_scales`."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in _read(model).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4(tensor.float().transpose(1, 2))
        else:
            tensors[name] = tensor
    quantisation = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return _write(tensors, model, target, quantisation)


def write_fp8(model: Path, target: Path, block: tuple[int, int]) -> Path:
    """Every linear layer's matrix gets a `weight_scale_inv`."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in _read(model).items():
        tensors[name] = tensor
        if tensor.ndim == 2 and not any(word in name for word in KEPT):
            tensors[name], tensors[f"{name}_scale_inv"] = fp8(tensor.float(), block)
    quantisation = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
    }
    return _write(tensors, model, target, quantisation)


def mxfp4(values: Tensor) -> tuple[Tensor, Tensor]:
    """float [..., n * 32] -> blocks uint8 [..., n, 16] and scales uint8 [..., n]."""
    groups = values.unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1).clamp_min(2.0**-100)
    exponents = largest.log2().floor() - 2  # the largest number of e2m1 is 1.5 * 2^2
    scaled = groups / exponents.exp2()[..., None]
    codes = (scaled.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (scaled < 0)
    low, high = codes[..., 0::2], codes[..., 1::2]
    return (low + 16 * high).to(torch.uint8), (exponents + 127).to(torch.uint8)


def fp8(matrix: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """float [R, C] -> float8_e4m3fn [R, C] and the blocks' factors in float32."""
    (rows, columns), (high, wide) = matrix.shape, block
    scales = torch.empty(-(-rows // high), -(-columns // wide))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
            scales[i, j] = matrix[here].abs().max() / E4M3_MAX
            codes[here] = (matrix[here] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def _read(model: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(model.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _write(tensors: dict[str, Tensor], model: Path, target: Path, quantisation: dict[str, object]) -> Path:
    target.mkdir(parents=True)
    for path in model.glob("*.json"):
        if "index" not in path.name:
            shutil.copyfile(path, target / path.name)
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": quantisation}
    (target / "config.json").write_text(json.dumps(config))
    where = {name: f"model-0000{1 + name.endswith(('_scales', '_scale_inv'))}-of-00002.safetensors" for name in tensors}
    for file in set(where.values()):
        part = {name: tensor.contiguous() for name, tensor in tensors.items() if where[name] == file}
        save_file(part, target / file, metadata={"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return target
