"""Step 7 of a request. Before: the result log. After: the future of the user's loop.

A result record -> the body that answers retrieve_future. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinker_hpc.gateway.wire import (
    JSON,
    PROTOBUF,
    encode_forward_backward_output,
    encode_sample_response,
    json_bytes,
)
from tinker_hpc.log import Record


@dataclass(frozen=True, slots=True)
class Answer:
    """The body of a finished retrieve_future."""

    media_type: str
    body: bytes


def failure(error: str, category: str) -> Answer:
    """A request that failed for good. `category`: user, server or unknown; the SDK raises RequestFailedError."""
    return Answer(JSON, json_bytes({"error": error, "category": category}))


def answer_of(result: Record, facts: Mapping[str, Any]) -> Answer:
    """The answer a result record means.

    Args:
        result: with `ok`, `op` and the fields ARCHITECTURE.md lists for that op.
        facts: of its request, `facts_of` below.
    """
    header = result.header
    op = header.get("op")
    if not header.get("ok"):
        return failure(str(header.get("error") or "the worker gave no reason"), str(header.get("category") or "server"))
    try:
        if op == "forward_backward":
            return Answer(PROTOBUF, encode_forward_backward_output(header, result.arrays))
        if op == "sample":
            return Answer(PROTOBUF, encode_sample_response(header, result.arrays))
        return Answer(JSON, json_bytes(_json_of(str(op), header, facts)))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        return failure(
            f"the gateway cannot read the worker's result of {op} ({type(error).__name__}: {error}). "
            "Are gateway and worker of the same tinker_hpc version?",
            "server",
        )


def _json_of(op: str, header: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    model_id = header.get("model_id")
    if op == "create_model" and facts.get("state_path"):
        return {"type": "load_weights", "model_id": model_id, "path": facts["state_path"]}
    if op == "create_model":
        return {"type": "create_model", "model_id": model_id}
    if op == "optim_step":
        return {"type": "optim_step", "metrics": header.get("metrics") or {}}
    if op == "save_state":
        return {"type": "save_weights", "path": header["path"]}
    if op == "load_state":
        return {"type": "load_weights", "model_id": model_id, "path": facts.get("state_path")}
    if op == "save_sampler_weights":
        # Exactly one of the two: the SDK asserts on the one it asked for.
        if facts.get("sampling_session_id"):
            return {"type": "save_weights_for_sampler", "sampling_session_id": facts["sampling_session_id"]}
        kind = "save_weights_external" if "/external_weights/" in header["path"] else "save_weights_for_sampler"
        return {"type": kind, "path": header["path"]}
    if op == "open_sampler":
        return {"type": "create_sampling_session", "sampling_session_id": facts["sampling_session_id"]}
    if op == "cancel":
        return {}
    raise ValueError(f"no answer is known for op {op!r}")


def facts_of(request: Mapping[str, Any]) -> dict[str, Any]:
    """What answering will need of a request's header, so that the header itself can be forgotten."""
    op = request["op"]
    facts: dict[str, Any] = {}
    if op == "create_model" and request.get("from_state"):
        facts["state_path"] = request["from_state"]["path"]
    elif op == "load_state":
        facts.update(state_path=request["path"], age=request.get("age"))
    elif op in ("save_sampler_weights", "open_sampler") and request.get("sampling_session_id"):
        facts["sampling_session_id"] = request["sampling_session_id"]
    elif op == "rejected":
        facts.update(error=request["error"], category=request["category"])
    return facts


def reply_of_sample(request_id: str, num_samples: int) -> dict[str, Any]:
    """What the accepting endpoint answers to a sample, the first time, to a retry, and after a restart."""
    return {"request_id": request_id, "sample_sequence_ids": [f"{request_id}:{index}" for index in range(num_samples)]}


def reply_of(op: str, request_id: str, model_id: str | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same of any other request; `facts`: as `facts_of` gives them."""
    if op == "open_sampler":
        return {"type": "create_sampling_session", "sampling_session_id": facts["sampling_session_id"]}
    return {"request_id": request_id, "model_id": model_id}
