"""Is a sampling request right? The same rules as validate.py: what was given, expected, what to change. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tinker_hpc.base_models import BaseModel
from tinker_hpc.gateway.completions import Target
from tinker_hpc.gateway.prompt_asks import last_n, prompt_asks
from tinker_hpc.gateway.validate import integer, number, refuse, seed, text
from tinker_hpc.gateway.wire import prompt_tokens

MAX_NUM_SAMPLES = 4096
LEAST_TEMPERATURE = 1e-6
"""Far below it, logits divided by it are beyond float32."""


def sample(payload: Mapping[str, Any], base: BaseModel) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Judge an asample body.

    `record_stability_info` is let pass and nothing is recorded: what it is for, the loss stable_reinforce, is refused
    with its own hint, and cookbook programs set it whatever their loss.

    Returns: (header fields, arrays) as ARCHITECTURE.md has them; `seed` and `max_tokens` None where none was given.
    """
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
    room = _room(prompt.size, base)
    header = {
        "num_samples": num_samples,
        "max_tokens": _max_tokens(params.get("max_tokens"), prompt.size, room, base),
        "temperature": _temperature(params.get("temperature", 1.0)),
        "top_k": _top_k(params.get("top_k", -1), base),
        "top_p": _top_p(params.get("top_p", 1.0)),
        "seed": seed(params.get("seed")),
        "stop": _stop(params.get("stop"), base),
        "prompt_logprobs": bool(payload.get("prompt_logprobs")),
        "prompt_logprobs_last_n": last_n(payload, prompt.size),
    }
    sampled = num_samples * (header["max_tokens"] or room)
    fields, arrays = prompt_asks(payload, base, prompt_length=prompt.size, sampled=sampled)
    return header | fields, {"prompt": prompt.astype(np.int32), **arrays}


def _room(prompt_length: int, base: BaseModel) -> int:
    """New tokens that the model's context has room for."""
    room = base.max_context - prompt_length
    if room < 1:
        refuse(
            f"the prompt has {prompt_length} tokens and {base.name} a context of {base.max_context}: no room for a "
            "new token. Shorten the prompt."
        )
    return room


def _max_tokens(value: Any, prompt_length: int, room: int, base: BaseModel) -> int | None:
    """None stays None: the worker gives what its memory holds, which is not known here and may be less than `room`."""
    if value is None:
        return None
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
    if temperature < 0 or 0 < temperature < LEAST_TEMPERATURE:
        refuse(f"temperature is {temperature}, expected 0 (greedy), or {LEAST_TEMPERATURE} or more.")
    return temperature


def _top_k(value: Any, base: BaseModel) -> int:
    """More than the vocabulary is no limit, as the vocabulary itself is; a tensor of the worker's may not hold it."""
    if not isinstance(value, int) or isinstance(value, bool) or value < -1 or value == 0:
        refuse(f"top_k is {value!r}, expected 1 or more, or -1 for no limit.")
    return min(value, base.vocab_size)


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


def completions(payload: Mapping[str, Any]) -> tuple[Target, int, float | None, list[str]]:
    """Judge a retrieve_futures body.

    Returns: whose samples, the cursor of the client's last answer, how long to hold the question in seconds (None: as
        we like), and the requests whose answers it has.
    """
    target = payload.get("target")
    if not isinstance(target, Mapping) or target.get("type", "sampling_session") != "sampling_session":
        refuse(f"target is {target!r}, expected a sampling session: {{sampling_session_id, cloned_sampler_id}}.")
    copy = integer({"cloned_sampler_id": target.get("cloned_sampler_id", 0)}, "cloned_sampler_id")
    cursor = integer({"prev_cursor": payload.get("prev_cursor", 0)}, "prev_cursor")
    timeout = payload.get("timeout")
    if timeout is not None and number("timeout", timeout) < 0:
        refuse(f"timeout is {timeout}, expected 0 or more seconds.")
    retrieved = payload.get("retrieved_request_ids") or []
    if not isinstance(retrieved, list) or not all(isinstance(request_id, str) for request_id in retrieved):
        refuse("retrieved_request_ids must be a list of texts.")
    return (text(target, "sampling_session_id"), copy), cursor, timeout, retrieved
