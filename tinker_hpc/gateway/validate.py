"""Is a training request right? If not: what was given, what was expected, what to change. Pure.

Everything here raises RequestError, which reaches the user as RequestFailedError(category="user"); the model and the
client stay usable. Order: the cheap and most likely mistakes first, so that one message names the real one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from tinker_hpc.base_models import BaseModel
from tinker_hpc.errors import RequestError
from tinker_hpc.gateway.wire import ForwardBackwardCall, WireDatum, WireTensor
from tinker_hpc.loss_table import INPUT_DTYPES, KNOWN_LOSSES, LossDeclaration, offered_losses

CHECKPOINT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+@-]{0,127}")
MIN_TTL_S, MAX_TTL_S = 3600, 10 * 365 * 24 * 3600
MAX_SEED = 2**63 - 1

ADAM_DEFAULTS: Mapping[str, float] = {
    "learning_rate": 1e-4,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-12,
    "weight_decay": 0.0,
    "grad_clip_norm": 0.0,
}


def refuse(message: str) -> NoReturn:
    raise RequestError(message)


# --- forward_backward -------------------------------------------------------------------------------------------


def forward_backward(call: ForwardBackwardCall, base: BaseModel) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Judge a forward_backward and flatten it for the log.

    Returns: (header fields, arrays) as ARCHITECTURE.md has them: `tokens` int32 [T], `offsets` int64 [n + 1],
        `input.<key>` int64 or float32 [T], datums one after the other.
    """
    declaration = loss_declaration(call.loss_fn)
    config = loss_config(call.loss_fn, declaration, call.loss_fn_config)
    if not call.data:
        refuse("forward_backward got no data; give at least one Datum.")
    for index, datum in enumerate(call.data):
        _check_datum(index, datum, call.loss_fn, declaration, base)
    keys = sorted(call.data[0].inputs)
    for index, datum in enumerate(call.data):
        if sorted(datum.inputs) != keys:
            refuse(
                f"data[{index}] has loss_fn_inputs {sorted(datum.inputs)}, data[0] has {keys}; "
                "all datums of one call need the same keys."
            )
    lengths = np.array([datum.tokens.size for datum in call.data], dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    tokens = np.concatenate([datum.tokens for datum in call.data]).astype(np.int32, copy=False)
    _check_ids(tokens, offsets, base, "model_input")
    arrays: dict[str, np.ndarray] = {"tokens": tokens, "offsets": offsets}
    for key in keys:
        flat = np.concatenate([datum.inputs[key].values for datum in call.data])
        arrays[f"input.{key}"] = _typed(key, flat, offsets)
    _check_ids(arrays["input.target_tokens"], offsets, base, "loss_fn_inputs['target_tokens']")
    header = {
        "loss_fn": call.loss_fn,
        "loss_fn_config": config,
        "forward_only": call.forward_only,
        "input_keys": keys,
        "trailing_shapes": {key: [] for key in keys},
    }
    return header, arrays


def loss_declaration(name: str) -> LossDeclaration:
    """The declaration of a loss this version computes."""
    offered = ", ".join(offered_losses())
    if name == "stable_reinforce":
        refuse(
            "loss_fn 'stable_reinforce' is not offered: its formula is not published. "
            f"Use loss_fn='importance_sampling' (same inputs, no provenance spans). This version computes: {offered}."
        )
    if name == "custom":
        refuse(
            "loss_fn 'custom' (a loss uploaded to the server) is not offered. Pass your function itself to "
            "forward_backward_custom(data, fn): it then runs beside your loop, with the same gradients."
        )
    declaration = KNOWN_LOSSES.get(name)
    if declaration is None:
        refuse(
            f"unknown loss_fn {name!r}. Tinker's losses are {', '.join(KNOWN_LOSSES)}; "
            f"this version computes: {offered}."
        )
    if not declaration.offered:
        refuse(
            f"loss_fn {name!r} is not computed by this version, which has: {offered}. "
            "Until it is, write it with forward_backward_custom(data, fn), which gives the same gradients."
        )
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


def _check_datum(index: int, datum: WireDatum, loss: str, declaration: LossDeclaration, base: BaseModel) -> None:
    where = f"data[{index}]"
    if datum.other_chunks:
        refuse(
            f"{where}.model_input has a chunk of kind {datum.other_chunks[0]!r}; {base.name} reads text only. "
            "Use EncodedTextChunk (ModelInput.from_ints)."
        )
    length = datum.tokens.size
    if length == 0:
        refuse(f"{where}.model_input is empty; give at least one token.")
    if length > base.max_context:
        refuse(
            f"{where}.model_input has {length} tokens, more than the context of {base.name}, {base.max_context}. "
            "Cut the sequence or split it into several datums."
        )
    missing = [key for key in declaration.required if key not in datum.inputs]
    if missing:
        refuse(
            f"{where}.loss_fn_inputs lacks {', '.join(missing)}: loss_fn {loss!r} needs "
            f"{', '.join(declaration.required)}, each of shape [{length}]. "
            f"Given: {', '.join(sorted(datum.inputs)) or 'none'}."
        )
    allowed = (*declaration.required, *declaration.optional)
    for key, tensor in datum.inputs.items():
        if key not in allowed:
            refuse(
                f"{where}.loss_fn_inputs has {key!r}, which loss_fn {loss!r} does not use. "
                f"Remove it; allowed: {', '.join(allowed)}."
            )
        _check_shape(f"{where}.loss_fn_inputs[{key!r}]", tensor, length, base)


def _check_shape(where: str, tensor: WireTensor, length: int, base: BaseModel) -> None:
    if tensor.sparse or len(tensor.shape) > 1:
        refuse(
            f"{where} has shape {list(tensor.shape)}{' (sparse)' if tensor.sparse else ''}; this version takes one "
            f"target per position, shape [{length}]. For [N, K] targets (top-k distillation), give K datums."
        )
    if tensor.shape != (length,) or tensor.values.size != length:
        refuse(
            f"{where} has shape {list(tensor.shape)} ({tensor.values.size} values) beside a model_input of {length} "
            f"tokens; expected [{length}]. With model_input = tokens[:-1], use target_tokens = tokens[1:] and as many "
            "weights."
        )


def _typed(key: str, flat: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[T] in the dtype of its key; NaN, infinities and float token ids refused."""
    dtype = np.dtype(INPUT_DTYPES[key])
    if dtype.kind == "i":
        if flat.dtype.kind != "i":
            refuse(
                f"loss_fn_inputs[{key!r}] is {flat.dtype.name}, expected int64 token ids. "
                "Convert it with .long() or dtype='int64'."
            )
        return flat.astype(dtype, copy=False)
    values = flat.astype(dtype, copy=False)
    bad = ~np.isfinite(values)
    if bad.any():
        at = int(np.argmax(bad))
        datum, position = _place(at, offsets)
        refuse(
            f"data[{datum}].loss_fn_inputs[{key!r}][{position}] is {values[at]} ({int(bad.sum())} such values in this "
            "call), expected finite numbers. It would make every gradient of the model NaN; look at how it was made."
        )
    return values


def _check_ids(flat: np.ndarray, offsets: np.ndarray, base: BaseModel, what: str) -> None:
    """Token ids must be rows of the embedding."""
    if int(flat.min()) >= 0 and int(flat.max()) < base.vocab_size:
        return
    bad = (flat < 0) | (flat >= base.vocab_size)
    at = int(np.argmax(bad))
    datum, position = _place(at, offsets)
    hint = " To leave a position out of the loss, set its weight to 0 and keep a valid id." if flat[at] < 0 else ""
    refuse(
        f"data[{datum}].{what}[{position}] is token id {int(flat[at])}; {base.name} has ids 0 to "
        f"{base.vocab_size - 1} ({int(bad.sum())} such ids in this call). "
        f"Use the tokenizer of that model: training_client.get_tokenizer().{hint}"
    )


def _place(flat_index: int, offsets: np.ndarray) -> tuple[int, int]:
    """Which datum, and which position in it, a flat index is."""
    datum = int(np.searchsorted(offsets, flat_index, side="right")) - 1
    return datum, flat_index - int(offsets[datum])


# --- the others -------------------------------------------------------------------------------------------------


def adam(payload: Mapping[str, Any]) -> dict[str, float]:
    """AdamParams of an optim_step body, defaults filled in."""
    params = payload.get("adam_params", payload.get("optim_params"))
    if params is None:
        family = (payload.get("optimizer_params") or {}).get("type")
        refuse(
            f"optim_step got parameters of optimizer {family!r}; this version has AdamW. "
            "Pass tinker.AdamParams(learning_rate=...) and create the model without optimizer=."
        )
    if not isinstance(params, Mapping):
        refuse(f"adam_params is {params!r}, expected an object with learning_rate, beta1, beta2, eps, weight_decay.")
    unknown = sorted(set(params) - set(ADAM_DEFAULTS) - {"type"})
    if unknown:
        refuse(f"adam_params has {', '.join(unknown)}; known are {', '.join(ADAM_DEFAULTS)}.")
    values = {key: number(f"AdamParams.{key}", params.get(key, default)) for key, default in ADAM_DEFAULTS.items()}
    for key in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
        if values[key] < 0:
            off = " (0 turns clipping off)" if key == "grad_clip_norm" else ""
            refuse(f"AdamParams.{key} is {values[key]}, expected 0 or more{off}.")
    for key in ("beta1", "beta2"):
        if not 0 <= values[key] < 1:
            refuse(f"AdamParams.{key} is {values[key]}, expected 0 <= {key} < 1.")
    return values


def lora(config: Any, base: BaseModel) -> dict[str, Any]:
    """LoraConfig of a create_model body: {rank, seed or None, train_mlp, train_attn, train_unembed}."""
    if config is None:
        refuse(
            "create_model without lora_config: full fine-tuning is not offered. Use create_lora_training_client(...)."
        )
    if not isinstance(config, Mapping):
        refuse(f"lora_config is {config!r}, expected an object with rank.")
    rank = config.get("rank")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1 or rank & (rank - 1):
        refuse(
            f"LoRA rank is {rank!r}; Tinker takes powers of two: 1, 2, 4, 8, 16, 32 (the default), ... "
            f"up to {_largest_rank(base)} for {base.name}."
        )
    if rank > _largest_rank(base):
        refuse(
            f"LoRA rank is {rank}, more than the hidden size of {base.name} ({base.hidden_size}) can use. "
            f"Take at most {_largest_rank(base)}."
        )
    targets = {key: bool(config.get(key, True)) for key in ("train_mlp", "train_attn", "train_unembed")}
    if not any(targets.values()):
        refuse(
            "train_mlp, train_attn and train_unembed are all False: nothing would be trained. Set at least one to True."
        )
    return {"rank": rank, "seed": seed(config.get("seed")), **targets}


def _largest_rank(base: BaseModel) -> int:
    return 1 << (base.hidden_size.bit_length() - 1)


def optimizer_config(config: Any) -> None:
    """Only AdamW, the default."""
    family = (config or {}).get("type", "adamw") if isinstance(config, Mapping | None) else config
    if family != "adamw":
        refuse(f"optimizer {family!r} is not offered; this version has AdamW. Leave optimizer= out.")


def seed(value: Any) -> int | None:
    """A seed, or None where the gateway is to draw one."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SEED:
        refuse(f"seed is {value!r}, expected an integer from 0 to 2**63 - 1, or None for a random one.")
    return value


def number(name: str, value: Any) -> float:
    """A finite float. JSON's null counts as NaN: that is how some clients write it."""
    if value is None:
        value = math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(f"{name} is {value!r}, expected a number.")
    if not math.isfinite(value):
        refuse(f"{name} is {value}, expected a finite number. A NaN would spread to every weight.")
    return float(value)


def integer(payload: Mapping[str, Any], key: str, *, least: int = 0) -> int:
    """A required integer field."""
    value = payload.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        refuse(f"{key} is {value!r}, expected an integer of {least} or more.")
    return value


def text(payload: Mapping[str, Any], key: str) -> str:
    """A required, non-empty text field."""
    value = payload.get(key)
    if not isinstance(value, str) or not value:
        refuse(f"{key} is {value!r}, expected a text.")
    return value


def checkpoint_name(value: Any) -> str:
    """A name that is one path segment: no slashes, no leading dot, so that it cannot leave its folder."""
    if not isinstance(value, str) or not CHECKPOINT_NAME.fullmatch(value):
        refuse(
            f"checkpoint name {value!r}: expected 1 to 128 letters, digits or _ . = + @ - , starting with a letter, "
            "digit or _ (no slashes). For example 'step-000100'."
        )
    return value


def ttl_seconds(value: Any) -> int | None:
    """Seconds until a checkpoint expires; None keeps it."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not MIN_TTL_S <= value <= MAX_TTL_S:
        refuse(
            f"ttl_seconds is {value!r}, expected {MIN_TTL_S} (one hour) to {MAX_TTL_S} (ten years), or None to keep it."
        )
    return value


def metadata(value: Any) -> dict[str, Any] | None:
    """user_metadata: an object or nothing."""
    if value is not None and not isinstance(value, dict):
        refuse(f"user_metadata is {value!r}, expected an object of texts.")
    return value
