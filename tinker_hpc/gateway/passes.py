"""Is a forward_backward right? If so it becomes flat arrays for the log; if not: what was given, expected, to change.

Pure. Everything here raises RequestError, as in validate.py. Shapes: N tokens of a datum, K targets of a token,
T tokens of all datums, n datums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinker_hpc.base_models import BaseModel
from tinker_hpc.custom_loss import CustomLoss
from tinker_hpc.gateway.custom_losses import CustomLosses
from tinker_hpc.gateway.guard import MAX_FORWARD_BACKWARD_BYTES
from tinker_hpc.gateway.validate import refuse
from tinker_hpc.gateway.wire import ForwardBackwardCall, WireDatum, WireTensor
from tinker_hpc.loss_table import CLIP_BOUNDS, INPUT_DTYPES, KNOWN_LOSSES, LossDeclaration

MAX_TARGETS = MAX_FORWARD_BACKWARD_BYTES // 8
"""Of one call, sparse ones written out: a few bytes of CSR can stand for any number of zeros."""


@dataclass(frozen=True)
class Losses:
    """What a run offers beside the published losses.

    uploaded: custom losses. stable_reinforce: the loss it stands for (Config.stable_reinforce).
    """

    uploaded: CustomLosses
    stable_reinforce: str | None = None


Judged = tuple[dict[str, Any], dict[str, np.ndarray]]


def forward_backward(call: ForwardBackwardCall, base: BaseModel, losses: Losses) -> Judged:
    """Judge a forward_backward and flatten it for the log.

    Returns: (header fields, arrays) as ARCHITECTURE.md has them: `tokens` int32 [T], `offsets` int64 [n + 1],
        `input.<key>` int64 or float32 [T] or [T * K], datums one after the other.
    """
    if call.loss_fn == "custom":
        return _custom(call, base, losses.uploaded)
    if call.loss_fn == "stable_reinforce" and losses.stable_reinforce:
        call = _as(losses.stable_reinforce, call)
    declaration = loss_declaration(call.loss_fn)
    config = loss_config(call.loss_fn, declaration, call.loss_fn_config)
    tokens, offsets = sequences(call, base)
    for index, datum in enumerate(call.data):
        _check_inputs(index, datum, call.loss_fn, declaration)
    keys = sorted(call.data[0].inputs)
    for index, datum in enumerate(call.data):
        if sorted(datum.inputs) != keys:
            refuse(
                f"data[{index}] has loss_fn_inputs {sorted(datum.inputs)}, data[0] has {keys}; "
                "all datums of one call need the same keys."
            )
    trailing = targets_a_token(call)
    arrays: dict[str, np.ndarray] = {"tokens": tokens, "offsets": offsets}
    for key in keys:
        flat = np.concatenate([dense(datum.inputs[key]) for datum in call.data])
        arrays[f"input.{key}"] = _typed(key, flat, offsets, math.prod(trailing))
    check_ids(arrays["input.target_tokens"], offsets, base, "loss_fn_inputs['target_tokens']", trailing)
    _check_bounds(config, arrays, offsets)
    header = {
        "loss_fn": call.loss_fn,
        "loss_fn_config": config,
        "forward_only": call.forward_only,
        "input_keys": keys,
        "trailing_shapes": {key: trailing for key in keys},
    }
    return header, arrays


def loss_declaration(name: str) -> LossDeclaration:
    """The declaration of a published loss."""
    if name == "stable_reinforce":
        refuse(
            "loss_fn 'stable_reinforce' is not offered: its formula is not published. Use "
            "loss_fn='importance_sampling' (same inputs, no provenance spans), or let it stand for that with "
            '`stable_reinforce = "importance_sampling"` in the configuration file.'
        )
    declaration = KNOWN_LOSSES.get(name)
    if declaration is None:
        refuse(f"unknown loss_fn {name!r}. Tinker's losses are {', '.join(KNOWN_LOSSES)}.")
    return declaration


def loss_config(name: str, declaration: LossDeclaration, given: Mapping[str, float | str]) -> dict[str, float]:
    """Defaults filled in; unknown keys, texts and NaN refused."""
    allowed = ", ".join(declaration.config) or "none"
    config = dict(declaration.config)
    for key, value in given.items():
        if key not in declaration.config:
            refuse(f"loss_fn_config has {key!r}, which loss_fn {name!r} does not know. Allowed keys: {allowed}.")
        if isinstance(value, str) or not math.isfinite(value):
            refuse(
                f"loss_fn_config[{key!r}] is {value!r}, expected a finite number (default {declaration.config[key]})."
            )
        config[key] = float(value)
    return config


def _as(loss_fn: str, call: ForwardBackwardCall) -> ForwardBackwardCall:
    """stable_reinforce, asked for by the user's configuration to be another loss: that one has no KL term."""
    kl_coeff = call.loss_fn_config.get("kl_coeff", 0)
    if kl_coeff not in (0, "0", "0.0"):
        refuse(
            f"loss_fn_config['kl_coeff'] is {kl_coeff!r}, but your configuration lets stable_reinforce stand for "
            f"{loss_fn}, which has no KL term. Leave kl_coeff out, or put the KL into the advantages."
        )
    config = {key: value for key, value in call.loss_fn_config.items() if key != "kl_coeff"}
    return replace(call, loss_fn=loss_fn, loss_fn_config=config)


def _custom(call: ForwardBackwardCall, base: BaseModel, uploaded: CustomLosses) -> Judged:
    """A pass of an uploaded loss. It reads what it declared; other loss_fn_inputs may be there and are left out.

    Its inputs may have any shape of their declared rank: `shapes.<key>` int64 [n, rank] says which.
    """
    loss_id = call.loss_fn_config.get("loss_id")
    if set(call.loss_fn_config) != {"loss_id"} or not isinstance(loss_id, str):
        refuse(
            f"loss_fn 'custom' takes loss_fn_config {{'loss_id': ...}}, given: {sorted(call.loss_fn_config)}. Use "
            "forward_backward_custom(data, handle) with the handle of service_client.create_custom_loss."
        )
    stored, loss = uploaded.get(loss_id)
    tokens, offsets = sequences(call, base)
    for index, datum in enumerate(call.data):
        _check_custom_inputs(index, datum, loss)
    trailing = targets_a_token(call)
    targets = np.concatenate([dense(datum.inputs["target_tokens"]) for datum in call.data])
    arrays: dict[str, np.ndarray] = {"tokens": tokens, "offsets": offsets}
    arrays["input.target_tokens"] = integers("target_tokens", targets)
    check_ids(arrays["input.target_tokens"], offsets, base, "loss_fn_inputs['target_tokens']", trailing)
    for key, rank in loss.inputs[1:]:
        arrays[f"custom.{key}"] = np.concatenate([dense(datum.inputs[key]) for datum in call.data])
        if rank:
            arrays[f"shapes.{key}"] = np.array([datum.inputs[key].shape for datum in call.data], dtype=np.int64)
    header = {
        "loss_fn": "custom",
        "loss_fn_config": {},
        "custom_loss": stored,
        "forward_only": call.forward_only,
        "input_keys": ["target_tokens"],
        "trailing_shapes": {"target_tokens": trailing},
    }
    return header, arrays


def _check_custom_inputs(index: int, datum: WireDatum, loss: CustomLoss) -> None:
    where = f"data[{index}].loss_fn_inputs"
    (_, logprobs_rank), *inputs = loss.inputs
    missing = [key for key in ("target_tokens", *(key for key, _ in inputs)) if key not in datum.inputs]
    if missing:
        refuse(f"{where} lacks {', '.join(missing)}, which custom loss {loss.name!r} takes.")
    targets = datum.inputs["target_tokens"]
    check_targets(f"{where}['target_tokens']", targets, datum.tokens.size)
    if len(targets.shape) != logprobs_rank:
        refuse(
            f"{where}['target_tokens'] has shape {list(targets.shape)}; custom loss {loss.name!r} declared logprobs, "
            f"which have the shape of target_tokens, with rank {logprobs_rank}."
        )
    for key, rank in inputs:
        tensor = datum.inputs[key]
        # A number has no shape on the wire, and neither has a list that was sent without one.
        given = 0 if rank == 0 and tensor.shape == (1,) else len(tensor.shape)
        if given != rank:
            refuse(
                f"{where}[{key!r}] has shape {list(tensor.shape)}, rank {given}; custom loss {loss.name!r} declared "
                f"{key} with rank {rank}."
            )
        if min(tensor.shape, default=0) < 0 or math.prod(tensor.shape) > MAX_TARGETS:
            refuse(f"{where}[{key!r}] has shape {list(tensor.shape)}; at most {MAX_TARGETS} values are taken.")
        check_size(f"{where}[{key!r}]", tensor)


def sequences(call: ForwardBackwardCall, base: BaseModel) -> tuple[np.ndarray, np.ndarray]:
    """The token sequences of all datums: `tokens` int32 [T], `offsets` int64 [n + 1]."""
    if not call.data:
        refuse("forward_backward got no data; give at least one Datum.")
    for index, datum in enumerate(call.data):
        where = f"data[{index}].model_input"
        if datum.other_chunks:
            refuse(
                f"{where} has a chunk of kind {datum.other_chunks[0]!r}; {base.name} reads text only. "
                "Use EncodedTextChunk (ModelInput.from_ints)."
            )
        length = datum.tokens.size
        if length == 0:
            refuse(f"{where} is empty; give at least one token.")
        if length > base.max_context:
            refuse(
                f"{where} has {length} tokens, more than the context of {base.name}, {base.max_context}. "
                "Cut the sequence or split it into several datums."
            )
    lengths = np.array([datum.tokens.size for datum in call.data], dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    tokens = np.concatenate([datum.tokens for datum in call.data]).astype(np.int32, copy=False)
    check_ids(tokens, offsets, base, "model_input")
    return tokens, offsets


def targets_a_token(call: ForwardBackwardCall) -> list[int]:
    """[] for one target a token, [K] for K of them; the same in all datums."""
    first = call.data[0].inputs["target_tokens"].shape
    for index, datum in enumerate(call.data):
        shape = datum.inputs["target_tokens"].shape
        if shape[1:] != first[1:]:
            refuse(
                f"data[{index}].loss_fn_inputs['target_tokens'] has shape {list(shape)}, that of data[0] is "
                f"{list(first)}: within one call every token needs as many targets. Fill up with target 0 and "
                "weight 0, or make two calls: gradients add up."
            )
    trailing = [int(n) for n in first[1:]]
    count = sum(datum.tokens.size for datum in call.data) * math.prod(trailing)
    if count > MAX_TARGETS:
        refuse(
            f"target_tokens of this call are {count} targets ({trailing[0]} for each token), at most {MAX_TARGETS} "
            "are taken. Send fewer datums a call, or keep fewer targets a token."
        )
    return trailing


def _check_inputs(index: int, datum: WireDatum, loss: str, declaration: LossDeclaration) -> None:
    where = f"data[{index}].loss_fn_inputs"
    length = datum.tokens.size
    missing = [key for key in declaration.required if key not in datum.inputs]
    if missing:
        refuse(
            f"{where} lacks {', '.join(missing)}: loss_fn {loss!r} needs "
            f"{', '.join(declaration.required)}, each of shape [{length}]. "
            f"Given: {', '.join(sorted(datum.inputs)) or 'none'}."
        )
    allowed = (*declaration.required, *declaration.optional)
    for key in datum.inputs:
        if key not in allowed:
            refuse(
                f"{where} has {key!r}, which loss_fn {loss!r} does not use. Remove it; allowed: {', '.join(allowed)}."
            )
    targets = datum.inputs["target_tokens"]
    check_targets(f"{where}['target_tokens']", targets, length)
    if len(targets.shape) == 2 and not declaration.several_targets:
        several = ", ".join(name for name, loss in KNOWN_LOSSES.items() if loss.several_targets)
        refuse(
            f"{where}['target_tokens'] has shape {list(targets.shape)}; loss_fn {loss!r} takes one target per "
            f"position, shape [{length}]. Several targets [N, K] are for: {several}."
        )
    for key, tensor in datum.inputs.items():
        if tensor.shape != targets.shape:
            refuse(
                f"{where}[{key!r}] has shape {list(tensor.shape)}, expected {list(targets.shape)}, the shape of "
                f"target_tokens beside a model_input of {length} tokens. Give one value per target."
            )
        check_size(f"{where}[{key!r}]", tensor)


def check_targets(where: str, tensor: WireTensor, length: int) -> None:
    """target_tokens are [N], or [N, K] with 1 or more targets a token."""
    shape = tensor.shape
    if not 1 <= len(shape) <= 2 or shape[0] != length or (len(shape) == 2 and shape[1] < 1):
        refuse(
            f"{where} has shape {list(shape)} beside a model_input of {length} tokens; expected [{length}], or "
            f"[{length}, K] for K targets per position. With model_input = tokens[:-1], use target_tokens = tokens[1:]."
        )
    check_size(where, tensor)


def check_size(where: str, tensor: WireTensor) -> None:
    """The values are as many as the shape says; CSR indices name places of the shape, in order."""
    if tensor.rows is None or tensor.columns is None:
        if tensor.values.size != math.prod(tensor.shape):
            refuse(
                f"{where} has shape {list(tensor.shape)} but {tensor.values.size} values; "
                f"expected {math.prod(tensor.shape)}."
            )
        return
    rows, columns = tensor.rows, tensor.columns
    if len(tensor.shape) != 2:
        refuse(f"{where} is sparse and has shape {list(tensor.shape)}; sparse tensors have two dimensions.")
    height, width = tensor.shape
    if (
        rows.size != height + 1
        or rows[0] != 0
        or rows[-1] != tensor.values.size
        or columns.size != tensor.values.size
        or (np.diff(rows) < 0).any()
    ):
        refuse(
            f"{where} is sparse with {tensor.values.size} values, {columns.size} column indices and {rows.size} row "
            f"pointers beside the shape {list(tensor.shape)}; expected {height + 1} row pointers that rise from 0 to "
            "the number of values, and one column index a value. Use TensorData.from_torch_sparse."
        )
    if columns.size and (columns.min() < 0 or columns.max() >= width):
        refuse(f"{where} is sparse and names a column outside of 0 to {width - 1}. Use TensorData.from_torch_sparse.")
    if (np.diff(_places(tensor)) <= 0).any():
        refuse(f"{where} is sparse and a row's columns do not rise. Use TensorData.from_torch_sparse.")


def _places(tensor: WireTensor) -> np.ndarray:
    """Flat index of each listed value."""
    assert tensor.rows is not None and tensor.columns is not None
    return np.repeat(np.arange(tensor.shape[0]), np.diff(tensor.rows)) * tensor.shape[1] + tensor.columns


def dense(tensor: WireTensor) -> np.ndarray:
    """All values, flat; those that CSR leaves out are 0. The size was checked."""
    if tensor.rows is None:
        return tensor.values
    written_out = np.zeros(math.prod(tensor.shape), dtype=tensor.values.dtype)
    written_out[_places(tensor)] = tensor.values
    return written_out


def _typed(key: str, flat: np.ndarray, offsets: np.ndarray, width: int) -> np.ndarray:
    """[T * width] in the dtype of its key; NaN, infinities and float token ids refused."""
    dtype = np.dtype(INPUT_DTYPES[key])
    if dtype.kind == "i":
        return integers(key, flat)
    values = flat.astype(dtype, copy=False)
    bad = ~np.isfinite(values)
    if bad.any():
        at = int(np.argmax(bad))
        datum, position = _place(at, offsets, width)
        refuse(
            f"data[{datum}].loss_fn_inputs[{key!r}]{position} is {values[at]} ({int(bad.sum())} such values in this "
            "call), expected finite numbers. It would make every gradient of the model NaN; look at how it was made."
        )
    return values


def integers(key: str, flat: np.ndarray) -> np.ndarray:
    """Token ids as int64; floats refused."""
    if flat.dtype.kind != "i":
        refuse(
            f"loss_fn_inputs[{key!r}] is {flat.dtype.name}, expected int64 token ids. "
            "Convert it with .long() or dtype='int64'."
        )
    return flat.astype(np.int64, copy=False)


def check_ids(
    flat: np.ndarray, offsets: np.ndarray, base: BaseModel, what: str, trailing: list[int] | None = None
) -> None:
    """Token ids must be rows of the embedding."""
    if int(flat.min()) >= 0 and int(flat.max()) < base.vocab_size:
        return
    bad = (flat < 0) | (flat >= base.vocab_size)
    at = int(np.argmax(bad))
    datum, position = _place(at, offsets, math.prod(trailing or ()))
    hint = " To leave a position out of the loss, set its weight to 0 and keep a valid id." if flat[at] < 0 else ""
    refuse(
        f"data[{datum}].{what}{position} is token id {int(flat[at])}; {base.name} has ids 0 to "
        f"{base.vocab_size - 1} ({int(bad.sum())} such ids in this call). "
        f"Use the tokenizer of that model: training_client.get_tokenizer().{hint}"
    )


def _check_bounds(config: Mapping[str, float], arrays: Mapping[str, np.ndarray], offsets: np.ndarray) -> None:
    """A clip's lower bound must not exceed its upper bound, wherever the two come from."""
    if not set(CLIP_BOUNDS) <= set(config):
        return
    low, high = (arrays.get(f"input.{key}", np.full(1, config[key], np.float32)) for key in CLIP_BOUNDS)
    crossed = np.atleast_1d(low > high)
    if crossed.any():
        at = int(np.argmax(crossed))
        values = [float(bound[at] if bound.size > 1 else bound[0]) for bound in (low, high)]
        datum, position = _place(at, offsets, 1)
        where = f" (data[{datum}]{position})" if crossed.size > 1 else ""
        refuse(
            f"clip_low_threshold is {values[0]:g} and clip_high_threshold {values[1]:g}{where}: bounds of the ratio "
            "exp(logprob - sampling logprob) itself, so low must not exceed high. For PPO with epsilon 0.2 they are "
            "0.8 and 1.2."
        )


def _place(flat_index: int, offsets: np.ndarray, width: int) -> tuple[int, str]:
    """Which datum, and which position in it, a flat index is."""
    row, column = divmod(flat_index, width)
    datum = int(np.searchsorted(offsets, row, side="right")) - 1
    position = f"[{row - int(offsets[datum])}]"
    return datum, position if width == 1 else f"{position}[{column}]"
