"""Peak resident memory of a CPU process that trains one micro-batch, as the kernel counted it.

    python tests/distributed/peak_memory.py MODEL_FOLDER LORA_RANK NUM_SEQUENCES SEQUENCE_LENGTH [recompute]

Prints JSON, in bytes.

"imported": with every library loaded and the process group made, but no model. "loaded": with model and adapter.
"peak": the most during a pass and a step; what loading itself needed for a moment is not in it.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the most since the last reset) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main(folder: str, rank: str, num_sequences: str, length: str, recompute: str = "") -> None:
    warnings.filterwarnings("ignore")
    from transformers import AutoConfig

    from megatron_adapters import runtime
    from megatron_adapters.engine import AdamParams, Datum, Engine, Layout, LoraSpec

    AutoConfig.from_pretrained(folder, local_files_only=True)
    runtime.start(Layout())
    imported = resident_bytes("VmRSS")
    count, n = int(num_sequences), int(length)
    engine = Engine.start(
        Path(folder), Layout(), dtype="float32", token_budget=count * n, recompute=recompute == "recompute"
    )
    engine.create_adapter("a", LoraSpec(rank=int(rank), seed=0))
    loaded = resident_bytes("VmRSS")
    random = np.random.default_rng(0)
    data = [
        Datum(row[:-1].astype(np.int32), {"target_tokens": row[1:]})
        for row in random.integers(0, engine.info.vocab_size, (count, n + 1), dtype=np.int64)
    ]
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again from what is resident
    engine.run_pass("a", data, lambda logprobs_T, inputs, segment_ids_T: -logprobs_T.sum(), backward=True)
    engine.optim_step("a", AdamParams())
    print(json.dumps({"imported": imported, "loaded": loaded, "peak": resident_bytes("VmHWM")}))
    engine.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
