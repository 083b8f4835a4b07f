"""Wrong ForwardBackwardRequests by the thousand: each is refused in words, or is one that can be logged.

Two ways to be wrong: a field that says something else (shapes, dtypes, sparse parts, losses, ids), and bytes that
were changed, cut or repeated. Seeded: FUZZ_SEED=N FUZZ_MESSAGES=M pytest this file. Over HTTP it is
tests/contract/test_fuzz.py.
"""

from __future__ import annotations

import collections
import os
import random
from pathlib import Path
from typing import Any

import numpy as np

from tinker_hpc.base_models import BaseModel
from tinker_hpc.errors import RequestError
from tinker_hpc.gateway import passes, wire
from tinker_hpc.gateway.custom_losses import CustomLosses
from tinker_hpc.log import Record, decode, encode
from tinker_hpc.loss_table import KNOWN_LOSSES

SEED = int(os.environ.get("FUZZ_SEED", "20261125"))
MESSAGES = int(os.environ.get("FUZZ_MESSAGES", "6000"))
BASE = BaseModel("org/tiny", Path("/models/tiny"), {}, vocab_size=100, max_context=16, hidden_size=48, model_type="q")
FLOATS = (0.0, 1.0, -1.0, 1e38, float("nan"), float("inf"))
SIZES = (0, 1, 2, 3, 4, -1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
LOSSES = (*KNOWN_LOSSES, "stable_reinforce", "custom", "", "cross_entropy\x00", "x" * 999)


def right(rng: random.Random) -> Any:
    """A ForwardBackwardRequest that is accepted."""
    loss = rng.choice(sorted(KNOWN_LOSSES))
    message = wire.messages.ForwardBackwardRequest(model_id="s-1:train:0", seq_id=1, loss_fn=loss)
    wide = KNOWN_LOSSES[loss].several_targets and rng.random() < 0.4
    for _ in range(rng.randrange(1, 3)):
        length = rng.randrange(1, 5)
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.arange(length, dtype="<i4").tobytes()
        for key in KNOWN_LOSSES[loss].required:
            tensor = datum.loss_fn_inputs[key]
            shape = (length, 2) if wide else (length,)
            integer = key == "target_tokens"
            tensor.dtype = wire.messages.DTYPE_INT64 if integer else wire.messages.DTYPE_FLOAT32
            tensor.shape.extend(shape)
            tensor.dense = np.ones(shape, "<i8" if integer else "<f4").tobytes()
    return message


def make_wrong(message: Any, rng: random.Random) -> None:
    """Change one field of it."""
    datum = rng.choice(message.data)
    key = rng.choice(sorted(datum.loss_fn_inputs))
    tensor = datum.loss_fn_inputs[key]

    def sparse() -> None:
        rows, columns = ([rng.choice(SIZES) for _ in range(rng.randrange(6))] for _ in range(2))
        tensor.sparse_csr.values = np.ones(len(columns), "<i8" if key == "target_tokens" else "<f4").tobytes()
        tensor.sparse_csr.crow_indices = np.array(sorted(rows) if rng.random() < 0.5 else rows, "<i8").tobytes()
        tensor.sparse_csr.col_indices = np.array(columns, "<i8").tobytes()
        if rng.random() < 0.5:
            tensor.shape[:] = [len(datum.model_input[0].encoded_text.tokens) // 4, rng.choice(SIZES)]

    def chunk() -> None:
        kind = rng.randrange(3)
        if kind == 0:
            datum.model_input.add().image.data = b"png"
        elif kind == 1:
            datum.model_input.add()
        else:
            ids = [rng.choice((0, 99, 100, -1, 2**31 - 1)) for _ in range(rng.randrange(20))]
            datum.model_input[0].encoded_text.tokens = np.array(ids, "<i4").tobytes()

    def config() -> None:
        name = rng.choice(("beta", "clip_low_threshold", "clip_high_threshold", "", "loss_id"))
        if rng.random() < 0.5:
            message.loss_fn_config[name] = rng.choice(FLOATS)
        else:
            message.loss_fn_config_v2[name].text = rng.choice(("0.1", "nan", "", "loss-" + "0" * 32))

    def add_key() -> None:
        name = rng.choice(("weights", "advantages", "clip_low_threshold", "x" * 300, ""))
        datum.loss_fn_inputs[name].CopyFrom(tensor)

    rng.choice(
        (
            sparse,
            sparse,
            chunk,
            config,
            add_key,
            lambda: tensor.shape.__setitem__(slice(None), [rng.choice(SIZES) for _ in range(rng.randrange(4))]),
            lambda: setattr(tensor, "dtype", rng.choice((0, 1, 2, 3, 4, 77))),
            lambda: setattr(tensor, "dense", rng.randbytes(rng.randrange(40))),
            lambda: datum.loss_fn_inputs.pop(key),
            lambda: setattr(message, "loss_fn", rng.choice(LOSSES)),
            message.data.add,
            lambda: message.data.__delitem__(slice(None)),
        )
    )()


def changed(body: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, repeated."""
    data = bytearray(body)
    for _ in range(rng.randrange(1, 5)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    start, end = sorted((rng.randrange(len(data)), rng.randrange(len(data) + 1)))
    return bytes(rng.choice((data, data[:end], data + data[start:end], data[start:])))


def test_any_message_is_refused_in_words_or_can_be_logged(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    losses = passes.Losses(CustomLosses(tmp_path), "importance_sampling")
    outcomes: collections.Counter[str] = collections.Counter()
    for number in range(MESSAGES):
        message = right(rng)
        for _ in range(rng.randrange(3)):
            if message.data and all(datum.loss_fn_inputs and datum.model_input for datum in message.data):
                make_wrong(message, rng)
        body = message.SerializeToString()
        if rng.random() < 0.4:
            body = changed(body, rng)
        try:
            call = wire.decode_forward_backward(body)
            assert len(wire.forward_backward_digest(call)) == 64
            header, arrays = passes.forward_backward(call, BASE, losses)
        except RequestError as error:
            assert len(str(error)) > 30
            outcomes["refused"] += 1
            continue
        except Exception as error:
            raise AssertionError(f"message {number} of seed {SEED}: {error!r} from {body.hex()}") from error
        logged = decode(encode(Record(header, arrays)))
        assert logged.header == header and all((logged.arrays[key] == arrays[key]).all() for key in arrays)
        outcomes["accepted"] += 1
    print(f"{MESSAGES} messages: {dict(outcomes)}")
    assert outcomes["refused"] > MESSAGES / 3 and outcomes["accepted"] > MESSAGES / 5
