"""What a sampling request asks about distributions: top-k, target and alternative tokens. Pure, as validate.py.

Legend: P prompt tokens, K candidates a place, C cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tinker_hpc.base_models import BaseModel
from tinker_hpc.gateway.validate import refuse

MAX_CELLS = 2**22
"""Of one answer, 8 bytes each. A whole row of the vocabulary for every token would be gigabytes in the log."""

Judged = tuple[dict[str, Any], dict[str, np.ndarray]]


def prompt_asks(payload: Mapping[str, Any], base: BaseModel, *, prompt_length: int, sampled: int) -> Judged:
    """(header fields, arrays) of these fields of an asample body; fields at their defaults are left out.

    Args: sampled: tokens that may be sampled, all samples together.
    Raises: RequestError.
    """
    fields: dict[str, Any] = {}
    places = {
        "topk_prompt_logprobs": prompt_length,
        "prompt_alt_tokens_k": prompt_length,
        "topk_sample_logprobs": sampled,
    }
    for key, count in places.items():
        if k := _width(payload, key, base):
            if k * count > MAX_CELLS:
                refuse(f"{key}={k} at {count} places make {k * count} numbers, at most {MAX_CELLS}. Ask for fewer.")
            fields[key] = k
    targets = payload.get("target_prompt_logprobs")
    if targets is None:
        return fields, {}
    fields["target_shape"], arrays = _targets(targets, base, prompt_length)
    return fields, arrays


def last_n(payload: Mapping[str, Any], prompt_length: int) -> int | None:
    """prompt_logprobs_last_n. Raises: RequestError."""
    value = payload.get("prompt_logprobs_last_n")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < prompt_length:
        refuse(
            f"prompt_logprobs_last_n is {value!r}, expected 1 to {prompt_length - 1} for a prompt of {prompt_length}."
        )
    if not payload.get("prompt_logprobs"):
        refuse(f"prompt_logprobs_last_n is {value} without prompt logprobs; set include_prompt_logprobs=True.")
    return value


def _width(payload: Mapping[str, Any], key: str, base: BaseModel) -> int:
    value = payload.get(key)
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= base.vocab_size:
        refuse(f"{key} is {value!r}, expected 0 (off) to {base.vocab_size}, the size of the vocabulary.")
    return value


def _targets(value: Any, base: BaseModel, prompt_length: int) -> tuple[list[int], dict[str, np.ndarray]]:
    name, rows = "target_prompt_logprobs", prompt_length - 1
    if not isinstance(value, Mapping) or value.get("dtype") != "int64":
        refuse(f"{name} must be an int64 tensor of token ids, shape [{rows}, K] for a prompt of {prompt_length}.")
    shape = value.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(n, int) and n >= 0 for n in shape):
        refuse(f"{name} has shape {shape!r}, expected [{rows}, K]: one row for each prompt token but the first.")
    if shape[0] != rows:
        refuse(
            f"{name} has {shape[0]} rows; a prompt of {prompt_length} tokens needs {rows} (all tokens but the first)."
        )
    ids = _integers(value.get("data"), f"{name}.data")
    arrays = {"target_ids": ids}
    crow = value.get("sparse_crow_indices")
    if crow is not None or value.get("sparse_col_indices") is not None:
        arrays["target_crow"] = _integers(crow, f"{name}.sparse_crow_indices")
        arrays["target_col"] = _integers(value.get("sparse_col_indices"), f"{name}.sparse_col_indices")
        _check_sparse(arrays, shape)
    elif ids.size != shape[0] * shape[1]:
        refuse(f"{name} has {ids.size} ids, its shape {shape} says {shape[0] * shape[1]}.")
    bad = (ids < -1) | (ids >= base.vocab_size)
    if bad.any():
        refuse(f"{name} has token id {int(ids[bad][0])}; {base.name} has ids 0 to {base.vocab_size - 1} (-1: none).")
    if not (ids >= 0).any():
        refuse(f"{name} names no token id at all; leave it out, or name at least one.")
    if ids.size > MAX_CELLS:
        refuse(f"{name} has {ids.size} cells, at most {MAX_CELLS}. Send several requests, or a sparse tensor.")
    return shape, arrays


def _check_sparse(arrays: Mapping[str, np.ndarray], shape: list[int]) -> None:
    ids, crow, col = arrays["target_ids"], arrays["target_crow"], arrays["target_col"]
    fits = (
        crow.size == shape[0] + 1
        and crow[0] == 0
        and crow[-1] == ids.size == col.size
        and (np.diff(crow) >= 0).all()
        and ((col >= 0) & (col < shape[1])).all()
    )
    if not fits:
        refuse(
            f"target_prompt_logprobs is no CSR tensor of shape {shape}: {crow.size} row pointers, {col.size} columns "
            f"and {ids.size} ids do not fit together."
        )


def _integers(value: Any, where: str) -> np.ndarray:
    if not isinstance(value, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in value):
        refuse(f"{where} must be a list of integers.")
    try:
        return np.asarray(value, dtype=np.int64)
    except OverflowError:
        refuse(f"{where} holds an integer beyond 64 bits.")
