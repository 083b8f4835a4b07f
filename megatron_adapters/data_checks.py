"""What a batch must be like before anything is computed. Pure, so every rank refuses the same data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinker_hpc.errors import RequestError, ShapeError

from .interface import Datum, ModelInfo


def check_data(data: Sequence[Datum], model: ModelInfo) -> None:
    """Refuse data that the model cannot run; what a loss needs beyond target_tokens is the loss's business.

    Raises: RequestError, ShapeError.
    """
    if not data:
        raise RequestError("a pass needs at least one datum; none was given.")
    keys = set(data[0].inputs)
    for index, datum in enumerate(data):
        length = len(datum.tokens)
        if length == 0:
            raise RequestError(f"datum {index} has no tokens. Leave it out of the batch.")
        if length > model.max_context:
            raise RequestError(
                f"datum {index} has {length} tokens, the model's context is {model.max_context}. Shorten it."
            )
        if set(datum.inputs) != keys:
            raise RequestError(
                f"datum {index} has the loss inputs {sorted(datum.inputs)}, datum 0 has {sorted(keys)}. "
                "All data of one call need the same keys."
            )
        if "target_tokens" not in keys:
            raise RequestError(
                f"the loss inputs {sorted(keys)} lack target_tokens: the token to score at every position."
            )
        for key, values in datum.inputs.items():
            if values.shape[0] != length or 0 in values.shape or (key == "target_tokens" and values.ndim > 2):
                raise ShapeError(
                    f"datum {index}: {key} has shape {list(values.shape)}, the datum has {length} tokens. "
                    "Give one entry per token, or K targets per token as [N, K]."
                )
            if values.shape[1:] != data[0].inputs[key].shape[1:]:
                raise ShapeError(
                    f"datum {index}: {key} has shape {list(values.shape)}, that of datum 0 is "
                    f"{list(data[0].inputs[key].shape)}. Within one call only the number of tokens may differ."
                )
        if datum.experts is not None:
            _check_experts(index, datum.experts, length, model)
        _check_ids(index, "tokens", datum.tokens, model)
        _check_ids(index, "target_tokens", datum.inputs["target_tokens"], model)


def _check_experts(index: int, experts: np.ndarray, length: int, model: ModelInfo) -> None:
    if model.num_experts == 0:
        raise ShapeError(
            f"datum {index} brings experts to go through, of shape {list(experts.shape)}, and this model has none. "
            "Were they sampled by another model? Leave them out."
        )
    expected = (length, model.expert_layers, model.experts_per_token)
    if experts.shape != expected:
        raise ShapeError(
            f"datum {index}: the experts to go through have shape {list(experts.shape)}, expected {list(expected)}: "
            "tokens, layers with experts, experts of a token. Were they sampled by another model?"
        )
    low, high = int(experts.min()), int(experts.max())
    if low < 0 or high >= model.num_experts:
        raise RequestError(f"datum {index}: expert {low if low < 0 else high} of {model.num_experts} was asked for.")


def _check_ids(index: int, name: str, ids: np.ndarray, model: ModelInfo) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= model.vocab_size:
        raise RequestError(
            f"datum {index}: {name} holds the id {low if low < 0 else high}, the vocabulary has ids 0 to "
            f"{model.vocab_size - 1}. Use the base model's own tokenizer."
        )
