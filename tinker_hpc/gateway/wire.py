"""Tinker's wire format <-> plain values. Pure: bytes and dicts in, numpy and dicts out, no I/O.

Only three messages are protobuf (tinker 0.25 to 0.38): ForwardBackwardRequest in, ForwardBackwardOutput and
SampleResponse out. Everything else is JSON. Tensors travel as raw little-endian bytes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import orjson

from tinker_hpc.errors import RequestError

# Far beyond any request, far below what Python's recursion takes.
MAX_DEPTH = 64
PROTOBUF = "application/x-protobuf"
JSON = "application/json"


def load_messages() -> ModuleType:
    """The SDK's compiled protobuf module, without importing `tinker` itself (which imports torch where present)."""
    loaded = sys.modules.get("tinker.proto.tinker_public_pb2")
    if loaded is not None:
        return loaded
    spec = importlib.util.find_spec("tinker")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the gateway needs the `tinker` package beside it: pip install 'tinker>=0.25'")
    path = Path(next(iter(spec.submodule_search_locations))) / "proto" / "tinker_public_pb2.py"
    module_spec = importlib.util.spec_from_file_location("tinker_hpc.gateway._tinker_public_pb2", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


messages: Any = load_messages()

_DTYPES = {messages.DTYPE_FLOAT32: np.dtype("<f4"), messages.DTYPE_INT64: np.dtype("<i8")}
_STOP_REASONS = {"stop": messages.STOP_REASON_STOP, "length": messages.STOP_REASON_LENGTH}


@dataclass(frozen=True)
class WireTensor:
    """One loss_fn_inputs entry as it came.

    values: flat. Dense: all entries of `shape`. Sparse (CSR, 2-D): the entries listed by `rows` int64 [shape[0] + 1]
        and `columns` int64; all others are 0.
    """

    values: np.ndarray
    shape: tuple[int, ...]
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None

    @property
    def parts(self) -> tuple[np.ndarray, ...]:
        """All the arrays that came."""
        return tuple(part for part in (self.values, self.rows, self.columns) if part is not None)


@dataclass(frozen=True)
class WireDatum:
    """One datum: `tokens` int32 [N]; `other_chunks` names chunk kinds that are not text."""

    tokens: np.ndarray
    inputs: Mapping[str, WireTensor]
    other_chunks: tuple[str, ...] = ()


@dataclass(frozen=True)
class ForwardBackwardCall:
    """A ForwardBackwardRequest, decoded but not yet judged."""

    model_id: str
    seq_id: int
    data: tuple[WireDatum, ...]
    loss_fn: str
    loss_fn_config: Mapping[str, float | str]
    forward_only: bool


def decode_forward_backward(body: bytes) -> ForwardBackwardCall:
    """Parse a ForwardBackwardRequest.

    Raises: RequestError if the bytes are no such message or a tensor's bytes do not divide into its dtype.
    """
    message = messages.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except Exception as error:  # google.protobuf.message.DecodeError, whichever implementation is loaded
        raise RequestError(
            f"the body ({len(body)} bytes) is not a protobuf ForwardBackwardRequest: {error}. "
            "Use tinker>=0.25, which sends protobuf."
        ) from error
    config: dict[str, float | str] = dict(message.loss_fn_config)
    # Messages are those of the SDK beside the gateway; 0.25 has no such field yet.
    for key, value in getattr(message, "loss_fn_config_v2", {}).items():
        config[key] = value.text if value.WhichOneof("value") == "text" else value.number
    return ForwardBackwardCall(
        model_id=message.model_id,
        seq_id=message.seq_id,
        data=tuple(_decode_datum(datum, index) for index, datum in enumerate(message.data)),
        loss_fn=message.loss_fn,
        loss_fn_config=config,
        forward_only=message.forward_only,
    )


def _decode_datum(datum: Any, index: int) -> WireDatum:
    pieces: list[bytes] = []
    others: list[str] = []
    for chunk in datum.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind == "encoded_text":
            pieces.append(chunk.encoded_text.tokens)
        else:
            others.append(kind or "empty")
    tokens = _from_bytes(b"".join(pieces), np.dtype("<i4"), f"data[{index}].model_input")
    inputs = {
        key: _decode_tensor(tensor, f"data[{index}].loss_fn_inputs[{key!r}]")
        for key, tensor in datum.loss_fn_inputs.items()
    }
    return WireDatum(tokens=tokens, inputs=inputs, other_chunks=tuple(others))


def _decode_tensor(tensor: Any, where: str) -> WireTensor:
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        name = messages.DType.Name(tensor.dtype) if tensor.dtype in messages.DType.values() else tensor.dtype
        raise RequestError(f"{where} has dtype {name}; the wire knows float32 and int64.")
    if tensor.HasField("sparse_csr"):
        csr = tensor.sparse_csr
        rows, columns = (_from_bytes(part, np.dtype("<i8"), where) for part in (csr.crow_indices, csr.col_indices))
        return WireTensor(_from_bytes(csr.values, dtype, where), tuple(tensor.shape), rows, columns)
    values = _from_bytes(tensor.dense, dtype, where)
    shape = tuple(tensor.shape) or (values.size,)
    return WireTensor(values=values, shape=shape)


def _from_bytes(data: bytes, dtype: np.dtype, where: str) -> np.ndarray:
    if len(data) % dtype.itemsize:
        raise RequestError(f"{where} has {len(data)} bytes, not a multiple of {dtype.itemsize} ({dtype.name}).")
    return np.frombuffer(data, dtype=dtype)


def forward_backward_digest(call: ForwardBackwardCall) -> str:
    """SHA-256 of what was asked. Of the decoded values, because a retry may serialize its maps in another order."""
    digest = hashlib.sha256()
    head = [call.loss_fn, sorted(call.loss_fn_config.items()), call.forward_only, len(call.data)]
    digest.update(json.dumps(head).encode())
    for datum in call.data:
        keys = sorted(datum.inputs)
        shapes = [[key, datum.inputs[key].values.dtype.name, *_extent(datum.inputs[key])] for key in keys]
        digest.update(json.dumps([datum.tokens.size, datum.other_chunks, shapes]).encode())
        digest.update(datum.tokens.data)
        for key in keys:
            for part in datum.inputs[key].parts:
                digest.update(part.data)
    return digest.hexdigest()


def _extent(tensor: WireTensor) -> tuple[object, ...]:
    """Where a tensor's arrays end and the next one's begin."""
    return (tensor.shape,) if tensor.rows is None else (tensor.shape, [part.size for part in tensor.parts])


def json_digest(payload: Mapping[str, Any], *, without: Sequence[str] = ()) -> str:
    """SHA-256 of a JSON body with sorted keys, leaving out keys that a retry is free to change."""
    kept = {key: value for key, value in payload.items() if key not in without}
    try:
        data = orjson.dumps(kept, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # integers beyond 64 bits and lone surrogates, which it does not write
        data = json.dumps(kept, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object. NaN and Infinity parse (Python clients write them), so that validation can name the field.

    Raises: RequestError if it is not JSON or not an object.
    """
    try:
        value = orjson.loads(body or b"{}")
    except ValueError:
        try:
            value = json.loads(body)
        except ValueError as error:
            raise RequestError(f"the body ({len(body)} bytes) is not JSON: {error}") from error
        except RecursionError as error:
            raise _too_deep() from error
    if not isinstance(value, dict):
        raise RequestError(f"the body is JSON {type(value).__name__}, expected an object with named fields.")
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise _too_deep()
    return value


def _too_deep() -> RequestError:
    return RequestError(f"the body is JSON nested more than {MAX_DEPTH} deep, which no request is.")


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            each
            for container in level
            for each in (container.values() if isinstance(container, dict) else container)
            if isinstance(each, dict | list)
        ]
        if not level:
            return False
    return True


def json_bytes(value: Any) -> bytes:
    """JSON for an answer. NaN and Infinity stay (stdlib spelling): a NaN gradient norm must reach the user as NaN."""
    return json.dumps(value, separators=(",", ":")).encode()


def prompt_tokens(prompt: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """A JSON ModelInput -> (tokens int64 [P], kinds of chunks that are not text).

    int64, so that an id beyond int32 is still there for validation to name.
    Raises: RequestError if it is not a ModelInput.
    """
    chunks = prompt.get("chunks") if isinstance(prompt, dict) else None
    if not isinstance(chunks, list):
        raise RequestError('prompt must be a ModelInput: {"chunks": [{"type": "encoded_text", "tokens": [...]}]}.')
    tokens: list[int] = []
    others: list[str] = []
    for chunk in chunks:
        kind = chunk.get("type", "encoded_text") if isinstance(chunk, dict) else type(chunk).__name__
        if kind != "encoded_text":
            others.append(str(kind))
        elif isinstance(chunk.get("tokens"), list):
            tokens.extend(chunk["tokens"])
        else:
            raise RequestError(f"a chunk's tokens are {chunk.get('tokens')!r}, expected a list of integers.")
    try:
        array = np.asarray(tokens) if tokens else np.empty(0, np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"prompt tokens must be integers: {error}") from error
    if array.dtype != np.int64 or array.ndim != 1:  # 5.5, True and lists of lists do not become ids silently
        raise RequestError(f"prompt tokens must be integers; these make an array of {array.dtype} {array.shape}.")
    return array, tuple(others)


def encode_forward_backward_output(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """A forward_backward result -> ForwardBackwardOutput: one ArrayRecord over all datums.

    Args:
        header: `metrics` {"name:reduction": value}; optional `loss_fn_output_type`, and `trailing_shape` [K] where
            there are K targets a token.
        arrays: `logprobs` float32 [T * K] flat, `offsets` int64 [n + 1] in tokens.
    """
    output = messages.ForwardBackwardOutput()
    output.loss_fn_output_type = header.get("loss_fn_output_type") or "ArrayRecord"
    for name, value in (header.get("metrics") or {}).items():
        output.metrics[name] = float(value)
    offsets = np.ascontiguousarray(arrays["offsets"], dtype="<i8")
    logprobs = np.ascontiguousarray(arrays["logprobs"], dtype="<f4")
    record = output.loss_fn_outputs.add()
    record.num_datums = offsets.size - 1
    field = record.fields["logprobs"]
    field.data = logprobs.tobytes()
    trailing = [int(n) for n in header.get("trailing_shape") or ()]
    field.offsets = (offsets * (logprobs.itemsize * math.prod(trailing))).tobytes()  # the wire counts bytes
    field.trailing_shape.extend(trailing)
    field.dtype = messages.DTYPE_FLOAT32
    return output.SerializeToString()


def encode_sample_response(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """A sample result -> SampleResponse.

    Args:
        header: `stop_reasons`, one of "stop", "length" per sequence; K and shapes as ARCHITECTURE.md has them.
        arrays: `tokens` int32 and `logprobs` float32, flat, `offsets` int64 [n + 1]; and what was asked beside them:
            `prompt_logprobs` float32 [P] (NaN, which the SDK turns into None, where not scored), `topk_*`, `target_*`,
            `alt_*`, flat.
    """
    response = messages.SampleResponse()
    offsets = arrays["offsets"]
    tokens = np.ascontiguousarray(arrays["tokens"], dtype="<i4")
    logprobs = np.ascontiguousarray(arrays["logprobs"], dtype="<f4")
    for index, reason in enumerate(header["stop_reasons"]):
        start, end = int(offsets[index]), int(offsets[index + 1])
        sequence = response.sequences.add()
        sequence.stop_reason = _STOP_REASONS[reason]
        sequence.tokens = tokens[start:end].tobytes()
        sequence.logprobs = logprobs[start:end].tobytes()
        if k := header.get("topk_sample"):
            rows = slice(start * k, end * k)
            topk = sequence.topk_sampled_logprobs
            _fill_topk(topk, arrays["topk_sample_ids"][rows], arrays["topk_sample_logprobs"][rows], k)
    if "prompt_logprobs" in arrays:
        response.prompt_logprobs = arrays["prompt_logprobs"].astype("<f4").tobytes()
    if k := header.get("topk_prompt"):
        _fill_topk(response.topk_prompt_logprobs, arrays["topk_prompt_ids"], arrays["topk_prompt_logprobs"], k)
    if "target_logprobs" in arrays:
        _fill_targets(response.target_prompt_logprobs, arrays, header["target_shape"])
    if k := header.get("prompt_alt_tokens_k"):
        alternatives = response.prompt_alt_tokens
        _fill_tensor(alternatives.tokens, arrays["alt_tokens"].astype("<i8"), [-1, k], messages.DTYPE_INT64)
        _fill_tensor(alternatives.logprobs, arrays["alt_logprobs"].astype("<f4"), [-1, k], messages.DTYPE_FLOAT32)
    return response.SerializeToString()


def _fill_topk(topk: Any, token_ids: np.ndarray, logprobs: np.ndarray, k: int) -> None:
    topk.token_ids = token_ids.astype("<i4").tobytes()
    topk.logprobs = logprobs.astype("<f4").tobytes()
    topk.k = k
    topk.length = token_ids.size // k


def _fill_tensor(tensor: Any, values: np.ndarray, shape: Sequence[int], dtype: int) -> None:
    tensor.dtype = dtype
    tensor.shape.extend(values.reshape(shape).shape)
    tensor.dense = values.tobytes()


def _fill_targets(tensor: Any, arrays: Mapping[str, np.ndarray], shape: Sequence[int]) -> None:
    """In the layout they were asked in: dense, or CSR with the request's own indices."""
    values = arrays["target_logprobs"].astype("<f4")
    if "target_crow" not in arrays:
        _fill_tensor(tensor, values, shape, messages.DTYPE_FLOAT32)
        return
    tensor.dtype = messages.DTYPE_FLOAT32
    tensor.shape.extend(shape)
    tensor.sparse_csr.values = values.tobytes()
    tensor.sparse_csr.crow_indices = arrays["target_crow"].astype("<i8").tobytes()
    tensor.sparse_csr.col_indices = arrays["target_col"].astype("<i8").tobytes()
