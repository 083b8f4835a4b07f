"""Step 5 of a request. Before: worker/schedule.py. After: megatron_adapters/engine.py.

Records of the log <-> what the engine takes and gives. Pure. The gateway has validated requests, and the engine checks
lengths and token ids once more; here it is whether the arrays fit together and are finite: NaN in one pass would spoil
the gradients of every pass beside it. Every rank makes the same checks on the same bytes, so all refuse together.

Legend: T tokens of all datums of a request, N tokens of one datum, P prompt tokens, K candidates, C cells.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_adapters.interface import Datum, LoraSpec, ModelInfo, PassOutput
from megatron_adapters.sample_request import PromptTargets, SampleRequest, SampleResult
from tinker_hpc import routing_record
from tinker_hpc.errors import RequestError
from tinker_hpc.log import Record
from tinker_hpc.loss_table import KNOWN_LOSSES

RENAMED: Mapping[str, str] = {"logprobs": "sampling_logprobs"}
"""Wire key -> ours: in a loss, plain `logprobs` are the trainer's."""


def train_groups(requests: Sequence[Record], alone: Collection[int]) -> list[list[Record]]:
    """Cut a training batch, in its order, into what is computed at once: neighbouring passes of different models, all
    forward_only or none. Anything else is by itself, and so are the passes whose `seq` is in `alone`.

    Passes of one model are never mixed with each other, so that a model that has the worker to itself gives the same
    bits however its requests come in.
    """
    groups: list[list[Record]] = []
    for request in requests:
        last = groups[-1][-1].header if groups else {}
        mixes = all(h.get("op") == "forward_backward" and h["seq"] not in alone for h in (last, request.header))
        same_kind = mixes and last["forward_only"] == request.header["forward_only"]
        if same_kind and request.header["model_id"] not in {other.header["model_id"] for other in groups[-1]}:
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups


def lora_spec(header: dict[str, Any]) -> LoraSpec:
    """The adapter that a create_model header asks for."""
    lora = header["lora"]
    switches = ("train_mlp", "train_attn", "train_unembed", "per_expert")
    return LoraSpec(int(lora["rank"]), int(lora["seed"]), **{key: bool(lora[key]) for key in switches if key in lora})


def to_data(request: Record) -> list[Datum]:
    """The datums of a forward_backward record, inputs under our names. Arrays are views.

    Raises: RequestError if the arrays do not fit together, an input is missing, or a value is NaN or infinite.
    """
    arrays = request.arrays
    tokens, offsets = arrays["tokens"], arrays["offsets"]
    if offsets.size < 2 or offsets[0] != 0 or offsets[-1] != tokens.size or (np.diff(offsets) <= 0).any():
        raise RequestError(f"offsets {offsets[:4]}... do not cut {tokens.size} tokens into non-empty sequences")
    keys: list[str] = request.header["input_keys"]
    inputs = {key: _input(request, key, tokens.size) for key in keys}
    loss = request.header["loss_fn"]
    required = KNOWN_LOSSES[loss].required if loss in KNOWN_LOSSES else ("target_tokens",)
    missing = [key for key in required if key not in inputs]
    if missing:
        raise RequestError(f"loss_fn {loss!r} needs {', '.join(required)}; {', '.join(missing)} not given")
    return [
        Datum(tokens[start:end], {RENAMED.get(key, key): values[start:end] for key, values in inputs.items()}, experts)
        for start, end, experts in zip(offsets[:-1].tolist(), offsets[1:].tolist(), _experts(request), strict=True)
    ]


def _experts(request: Record) -> list[np.ndarray | None]:
    """Of each datum the experts that it is to go through, [N, M, K]."""
    offsets, experts = request.arrays["offsets"].tolist(), request.arrays.get("experts")
    if experts is None:
        return [None] * (len(offsets) - 1)
    found: list[np.ndarray | None] = []
    position = 0
    for source, start, end in zip(request.header["routing_from"], offsets[:-1], offsets[1:], strict=True):
        taken = 0 if source is None else end - start
        found.append(None if source is None else experts[position : position + taken])
        position += taken
    return found


def replayed_share(request: Record) -> dict[str, float]:
    """As a metric, the tokens that go through the experts of the sampler; nothing where routing is not replayed."""
    if "routing_from" not in request.header:
        return {}
    experts = request.arrays.get("experts", ())
    return {"routing_replayed:mean": len(experts) / request.arrays["tokens"].size}


def custom_inputs(request: Record, keys: Sequence[tuple[str, int]]) -> list[list[np.ndarray]]:
    """What an uploaded loss takes after logprobs: of each datum, one array per (key, rank), a copy.

    Raises: RequestError if the arrays do not fit together.
    """
    count = request.arrays["offsets"].size - 1
    columns = []
    for key, rank in keys:
        flat = request.arrays[f"custom.{key}"]
        shapes = request.arrays[f"shapes.{key}"] if rank else np.empty((count, 0), dtype=np.int64)
        ends = np.cumsum(shapes.prod(axis=1))
        if shapes.shape != (count, rank) or (shapes < 0).any() or int(ends[-1]) != flat.size:
            raise RequestError(f"custom loss input {key!r}: {flat.size} values do not fit the shapes of {count} data")
        pieces = np.split(flat, ends[:-1])
        columns.append([piece.reshape(shape).copy() for piece, shape in zip(pieces, shapes, strict=True)])
    return [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in range(count)]


def num_loss_tokens(request: Record) -> int:
    """How many tokens count in the loss: those with a weight or an advantage that is not 0."""
    for key in ("input.weights", "input.advantages"):
        if key in request.arrays:
            values = request.arrays[key].reshape(request.arrays["tokens"].size, -1)
            return int((values != 0).any(axis=1).sum())
    return int(request.arrays["tokens"].size)


def pass_result(output: PassOutput) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(header fields, arrays) of a forward_backward result: `logprobs` float32 flat, `offsets` int64 [n + 1].

    Offsets count tokens; with K targets a token, `trailing_shape` is [K] and the logprobs are K times as many.
    """
    logprobs, offsets = _flat(output.logprobs, np.float32)
    fields = {
        "metrics": {"loss:sum": output.loss_sum, **output.metrics},
        "loss_fn_output_type": "ArrayRecord",
        "trailing_shape": list(logprobs.shape[1:]),
    }
    return fields, {"logprobs": logprobs.reshape(-1), "offsets": offsets}


def to_sample(request: Record, info: ModelInfo, *, snapshot_id: str | None) -> SampleRequest:
    """What the sampler takes; end-of-sequence ids put in where `stop` is left to the model."""
    header = request.header
    kind, values = header["stop"]["type"], header["stop"].get("values") or []
    token_ids = {"eos": info.eos_token_ids, "tokens": values}.get(kind, ())
    return SampleRequest(
        snapshot_id=snapshot_id,
        prompt=request.arrays["prompt"],
        num_samples=header["num_samples"],
        max_tokens=header["max_tokens"],
        temperature=header["temperature"],
        top_k=header["top_k"],
        top_p=header["top_p"],
        seed=header["seed"],
        stop_token_ids=frozenset(int(i) for i in token_ids),
        stop_strings=tuple(values) if kind == "strings" else (),
        prompt_logprobs=bool(header.get("prompt_logprobs")),
        prompt_logprobs_last_n=header.get("prompt_logprobs_last_n"),
        topk_prompt_logprobs=header.get("topk_prompt_logprobs", 0),
        topk_sample_logprobs=header.get("topk_sample_logprobs", 0),
        target_prompt_logprobs=_targets(request),
        prompt_alt_tokens_k=header.get("prompt_alt_tokens_k", 0),
        note_experts=bool(header.get("note_experts")),
    )


def _targets(request: Record) -> PromptTargets | None:
    """The cells of target_prompt_logprobs, dense [P - 1, K] or sparse (CSR), one after the other."""
    arrays = request.arrays
    if "target_ids" not in arrays:
        return None
    ids = arrays["target_ids"]
    if "target_crow" in arrays:
        rows = np.repeat(np.arange(arrays["target_crow"].size - 1), np.diff(arrays["target_crow"]))
    else:
        rows = np.repeat(np.arange(request.header["target_shape"][0]), request.header["target_shape"][1])
    return PromptTargets(rows.astype(np.int64), ids)


def sample_result(request: Record, result: SampleResult) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(header fields, arrays) of a sample result; sequences one after the other with `offsets` int64 [n + 1]."""
    fields: dict[str, Any] = {"stop_reasons": [s.stop_reason for s in result.sequences]}
    tokens, offsets = _flat([s.tokens for s in result.sequences], np.int32)
    logprobs, _ = _flat([s.logprobs for s in result.sequences], np.float32)
    arrays = {"tokens": tokens, "logprobs": logprobs, "offsets": offsets}
    routed = [
        routing_record.Sampled(s.tokens, s.experts.prompt, s.experts.sampled)
        for s in result.sequences
        if s.experts is not None
    ]
    if routed:
        fields["experts"], arrays["experts"] = routing_record.encode(request.arrays["prompt"], routed)
    if request.header.get("topk_sample_logprobs"):
        fields["topk_sample"] = request.header["topk_sample_logprobs"]
        pieces = [s.topk for s in result.sequences if s.topk is not None]
        arrays["topk_sample_ids"] = _flat([p.token_ids.reshape(-1) for p in pieces], np.int32)[0]
        arrays["topk_sample_logprobs"] = _flat([p.logprobs.reshape(-1) for p in pieces], np.float32)[0]
    prompt = result.prompt
    if prompt is None:
        return fields, arrays
    if prompt.logprobs is not None:
        arrays["prompt_logprobs"] = prompt.logprobs
    if prompt.topk is not None:
        fields["topk_prompt"] = prompt.topk.token_ids.shape[1]
        arrays["topk_prompt_ids"] = prompt.topk.token_ids.reshape(-1)
        arrays["topk_prompt_logprobs"] = prompt.topk.logprobs.reshape(-1)
    if prompt.targets is not None:  # in the layout they were asked in
        fields["target_shape"] = request.header["target_shape"]
        arrays["target_logprobs"] = prompt.targets
        arrays |= {key: request.arrays[key] for key in ("target_crow", "target_col") if key in request.arrays}
    if prompt.alternatives is not None:
        fields["prompt_alt_tokens_k"] = prompt.alternatives.token_ids.shape[1]
        arrays["alt_tokens"] = prompt.alternatives.token_ids.reshape(-1)
        arrays["alt_logprobs"] = prompt.alternatives.logprobs.reshape(-1)
    return fields, arrays


def _input(request: Record, key: str, num_tokens: int) -> np.ndarray:
    """One loss input as [T, ...]."""
    flat = request.arrays[f"input.{key}"]
    trailing = [int(n) for n in request.header.get("trailing_shapes", {}).get(key, [])]
    expected = num_tokens * int(np.prod(trailing, dtype=np.int64))
    if flat.size != expected:
        raise RequestError(
            f"loss_fn_inputs[{key!r}] has {flat.size} values beside {num_tokens} tokens: give {expected}"
        )
    if flat.dtype.kind == "f" and not np.isfinite(flat).all():
        raise RequestError(f"loss_fn_inputs[{key!r}] holds NaN or infinity; give finite numbers")
    return flat.reshape(num_tokens, *trailing)


def _flat(pieces: Sequence[np.ndarray], dtype: type) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([p.shape[0] for p in pieces], dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    flat = np.concatenate([np.asarray(p, dtype=dtype) for p in pieces]) if len(pieces) else np.empty(0, dtype)
    return flat, offsets
