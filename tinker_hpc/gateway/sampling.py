"""Is a sampling request right? The same rules as validate.py: what was given, expected, what to change. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tinker_hpc.base_models import BaseModel
from tinker_hpc.gateway.validate import integer, number, refuse, seed
from tinker_hpc.gateway.wire import prompt_tokens

MAX_NUM_SAMPLES = 4096

# Fields of tinker 0.38 this version does not compute, each with what to use instead. Falsy values are their defaults.
_NOT_OFFERED = {
    "topk_prompt_logprobs": "include_prompt_logprobs=True gives the logprob of each prompt token itself",
    "topk_sample_logprobs": "each sampled token carries its own logprob",
    "target_prompt_logprobs": "compute_logprobs on each candidate sequence",
    "prompt_alt_tokens_k": "sample() with max_tokens=1 at each prefix",
    "record_stability_info": "loss_fn='importance_sampling', which needs the sampled logprobs only",
}


def sample(payload: Mapping[str, Any], base: BaseModel) -> tuple[dict[str, Any], np.ndarray]:
    """Judge an asample body.

    Returns: (header fields, prompt int32 [P]) as ARCHITECTURE.md has them; `seed` None where none was given,
        `prompt_logprobs_last_n` beside them for the answer.
    """
    for field, instead in _NOT_OFFERED.items():
        if payload.get(field):
            refuse(f"sample: {field} is not offered by this version. Instead: {instead}.")
    prompt, others = prompt_tokens(payload.get("prompt"))
    if others:
        refuse(f"the prompt has a chunk of kind {others[0]!r}; {base.name} reads text only. Use ModelInput.from_ints.")
    if prompt.size == 0:
        refuse("the prompt is empty; give at least one token (the tokenizer's BOS or EOS will do).")
    bad = (prompt < 0) | (prompt >= base.vocab_size)
    if bad.any():
        at = int(np.argmax(bad))
        refuse(
            f"prompt[{at}] is token id {int(prompt[at])}; {base.name} has ids 0 to {base.vocab_size - 1}. "
            "Use the tokenizer of that model: sampling_client.get_tokenizer()."
        )
    num_samples = integer({"num_samples": payload.get("num_samples", 1)}, "num_samples", least=1)
    if num_samples > MAX_NUM_SAMPLES:
        refuse(f"num_samples is {num_samples}, at most {MAX_NUM_SAMPLES} a request. Send several requests.")
    params = payload.get("sampling_params") or {}
    if not isinstance(params, Mapping):
        refuse(f"sampling_params is {params!r}, expected an object with max_tokens, temperature, ...")
    header = {
        "num_samples": num_samples,
        "max_tokens": _max_tokens(params.get("max_tokens"), prompt.size, base),
        "temperature": _temperature(params.get("temperature", 1.0)),
        "top_k": _top_k(params.get("top_k", -1)),
        "top_p": _top_p(params.get("top_p", 1.0)),
        "seed": seed(params.get("seed")),
        "stop": _stop(params.get("stop"), base),
        "prompt_logprobs": bool(payload.get("prompt_logprobs")),
        "prompt_logprobs_last_n": _last_n(payload, prompt.size),
    }
    return header, prompt.astype(np.int32)


def _max_tokens(value: Any, prompt_length: int, base: BaseModel) -> int:
    room = base.max_context - prompt_length
    if room < 1:
        refuse(
            f"the prompt has {prompt_length} tokens and {base.name} a context of {base.max_context}: no room for a "
            "new token. Shorten the prompt."
        )
    if value is None:
        return room
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        refuse(f"max_tokens is {value!r}, expected an integer of 1 or more.")
    if value > room:
        refuse(
            f"a prompt of {prompt_length} tokens and max_tokens={value} make {prompt_length + value}, more than the "
            f"context of {base.name}, {base.max_context}. Use max_tokens={room} or less, or leave it out."
        )
    return value


def _temperature(value: Any) -> float:
    temperature = number("temperature", value)
    if temperature < 0:
        refuse(f"temperature is {temperature}, expected 0 (greedy) or more.")
    return temperature


def _top_k(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < -1 or value == 0:
        refuse(f"top_k is {value!r}, expected 1 or more, or -1 for no limit.")
    return value


def _top_p(value: Any) -> float:
    top_p = number("top_p", value)
    if not 0 < top_p <= 1:
        refuse(f"top_p is {top_p}, expected 0 < top_p <= 1 (1 for no limit).")
    return top_p


def _stop(value: Any, base: BaseModel) -> dict[str, Any]:
    """None: the model's EOS. []: nothing stops but max_tokens. Otherwise texts or token ids."""
    if value is None:
        return {"type": "eos", "values": []}
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        refuse(f"stop is {value!r}, expected a text, a list of texts, a list of token ids, [] or None.")
    if not value:
        return {"type": "none", "values": []}
    if all(isinstance(item, str) and item for item in value):
        return {"type": "strings", "values": value}
    if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        beyond = [item for item in value if not 0 <= item < base.vocab_size]
        if beyond:
            refuse(f"stop has token id {beyond[0]}; {base.name} has ids 0 to {base.vocab_size - 1}.")
        return {"type": "tokens", "values": value}
    refuse(f"stop is {value!r}; give non-empty texts only, or token ids only.")


def _last_n(payload: Mapping[str, Any], prompt_length: int) -> int | None:
    value = payload.get("prompt_logprobs_last_n")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < prompt_length:
        refuse(
            f"prompt_logprobs_last_n is {value!r}, expected 1 to {prompt_length - 1} for a prompt of {prompt_length}."
        )
    return value
