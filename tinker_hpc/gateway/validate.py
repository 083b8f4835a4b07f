"""Is a request right? If not: what was given, what was expected, what to change. Pure. (Passes: passes.py.)

Everything here raises RequestError, which reaches the user as RequestFailedError(category="user"); the model and the
client stay usable. Order: the cheap and most likely mistakes first, so that one message names the real one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from tinker_hpc.base_models import BaseModel
from tinker_hpc.errors import RequestError

CHECKPOINT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+@-]{0,127}")
MIN_TTL_S, MAX_TTL_S = 3600, 10 * 365 * 24 * 3600
MAX_SEED = 2**63 - 1
LEAST_EPS = 1e-30
"""In float32, as the optimizer computes. Without it a gradient of 0 is 0/0, and LoRA's A has none at first."""

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


def adam(payload: Mapping[str, Any]) -> dict[str, float]:
    """AdamParams of an optim_step body, defaults filled in."""
    params = payload.get("adam_params", payload.get("optim_params"))
    if params is None:
        given = payload.get("optimizer_params") or {}
        family = given.get("type") if isinstance(given, Mapping) else given
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
    if values["eps"] < LEAST_EPS:
        refuse(
            f"AdamParams.eps is {values['eps']}, expected {LEAST_EPS} or more (default 1e-12): without it a gradient "
            "of 0 makes NaN of its weight."
        )
    for key in ("learning_rate", "weight_decay", "grad_clip_norm"):
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
    try:
        value = float(value)
    except OverflowError:  # an integer, which JSON lets be as long as it likes
        value = math.inf if value > 0 else -math.inf
    if not math.isfinite(value):
        refuse(f"{name} is {value}, expected a finite number. A NaN would spread to every weight.")
    return value


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
