"""FP8 and MXFP4 against torch's own numbers, transformers' dequantisation, and the formats' definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quantised_models import fp8, mxfp4

from tinker_hpc.errors import ConfigError, WeightsError
from tinker_hpc.quantised import Stored, as_the_model_has_them, fp8_block, fp8_values, mxfp4_values, touched

BLOCK = (128, 128)
X, SCALE = "a.weight", "a.weight_scale_inv"


def test_every_code_of_fp8() -> None:
    codes = np.arange(256, dtype=np.uint8)[None]
    ours = fp8_values(codes, np.ones((1, 2), np.float32), BLOCK, (0, 0))
    theirs = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)


def test_every_byte_of_mxfp4_is_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = np.random.default_rng(0)
    blocks = np.concatenate([np.arange(256, dtype=np.uint8), random.integers(0, 256, 512, dtype=np.uint8)])
    blocks = blocks.reshape(2, 3, 8, 16)
    scales = random.integers(100, 140, (2, 3, 8), dtype=np.uint8)
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    ours = mxfp4_values(blocks, scales)
    assert ours.dtype == np.float32 and np.array_equal(ours.swapaxes(1, 2), theirs.numpy())
    assert torch.equal(torch.from_numpy(ours).bfloat16().float(), torch.from_numpy(ours)), "bfloat16 holds them"


def test_what_was_quantised_comes_back_to_half_a_step() -> None:
    matrix = torch.randn(70, 64, generator=torch.Generator().manual_seed(0))
    codes, scales = fp8(matrix, (32, 32))
    back = fp8_values(codes.view(torch.uint8).numpy(), scales.numpy(), (32, 32), (0, 0))
    assert np.allclose(back, matrix, rtol=2**-4, atol=float(scales.max()) * 2**-10)
    back = torch.from_numpy(mxfp4_values(*(x.numpy() for x in mxfp4(matrix))))
    # Steps of 2 at most below 8 times the factor, of which the largest number has at least 4.
    largest = matrix.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
    assert ((back - matrix).unflatten(-1, (-1, 32)).abs() <= largest / 4).all()


@pytest.mark.parametrize("rows", [(0, 70), (31, 33), (64, 70), (5, 6)])
@pytest.mark.parametrize("columns", [(0, 50), (40, 50), (7, 41)])
def test_a_part_of_a_matrix_is_the_part_of_the_whole(rows: tuple[int, int], columns: tuple[int, int]) -> None:
    """By the definition: each code times the factor of its block, the last blocks cut off."""
    block = (32, 20)
    codes, scales = fp8(torch.randn(70, 50, generator=torch.Generator().manual_seed(0)), block)
    whole = codes.double() * scales.double().repeat_interleave(32, 0)[:70].repeat_interleave(20, 1)[:, :50]
    (high, top), (wide, left) = touched(*rows, block[0]), touched(*columns, block[1])
    part = codes.view(torch.uint8)[slice(*rows), slice(*columns)].numpy()
    ours = fp8_values(part, scales[high, wide].numpy(), block, (top, left))
    assert np.allclose(ours, whole[slice(*rows), slice(*columns)], rtol=2**-23, atol=0)


def test_names_and_shapes() -> None:
    found = {
        "norm.weight": ("BF16", (8,)),
        X: ("F8_E4M3", (300, 128)),
        SCALE: ("F32", (3, 1)),
        "e_blocks": ("U8", (4, 10, 2, 16)),
        "e_scales": ("U8", (4, 10, 2)),
    }
    assert as_the_model_has_them(found, BLOCK, "here") == {
        "norm.weight": Stored((8,), "norm.weight"),
        X: Stored((300, 128), X, SCALE),
        "e": Stored((4, 64, 10), "e_blocks", "e_scales"),
    }
    stray = as_the_model_has_them({SCALE: ("F32", (1, 1))}, BLOCK, "here")
    assert stray == {SCALE: Stored((1, 1), SCALE)}, "left for those who know what a model must have"


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        ({X: ("F8_E4M3", (128, 128))}, "a.weight_scale_inv is missing"),
        ({X: ("F8_E4M3", (129, 128)), SCALE: ("F32", (1, 1))}, r"a.weight_scale_inv is \[1, 1\], expected \[2, 1\]"),
        ({"e_blocks": ("U8", (4, 10, 2, 16))}, "e_scales is missing"),
        ({"e_blocks": ("U8", (4, 10, 2, 16)), "e_scales": ("U8", (4, 10))}, r"e_scales is \[4, 10\]"),
    ],
)
def test_missing_factors_are_named(found: dict[str, tuple[str, tuple[int, ...]]], complaint: str) -> None:
    with pytest.raises(WeightsError, match=complaint):
        as_the_model_has_them(found, BLOCK, "here")


def test_fp8_without_a_block_size_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"a\.weight in here is stored as F8_E4M3, but config\.json has no"):
        as_the_model_has_them({X: ("F8_E4M3", (8, 8))}, None, "here")


def test_which_quantisations_are_read() -> None:
    def read(**quantisation: object) -> tuple[int, int] | None:
        return fp8_block({"quantization_config": quantisation})

    assert fp8_block({}) is None and read(quant_method="mxfp4") is None
    assert read(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 64]) == (128, 64)
    for other in (
        {"quant_method": "awq"},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"},
    ):
        with pytest.raises(ConfigError, match=rf"stored quantised .*{other['quant_method']}.*Give such a version"):
            read(**other)
