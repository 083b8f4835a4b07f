"""A saved adapter's files -> the same adapter as peft and vLLM load it for its base.

Experts are stored stacked. They become a pair of matrices each (peft_experts.py), or, where the base holds a layer's
experts as fused parameters, peft's form for those (peft_parameters.py); the saved file's metadata says where.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tinker_hpc.peft_experts import expand_experts, has_stacked_experts
from tinker_hpc.peft_parameters import parameters_config, write_parameters
from tinker_hpc.safetensors_file import TensorFile

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_FILES = (CONFIG_FILE, WEIGHTS_FILE)

BASE_EXPERTS, FUSED = "base_experts", "fused"
"""In the metadata of a saved adapter: the base holds the experts of a layer as fused parameters."""


def export_adapter(source: Path, target: Path) -> None:
    """Write PEFT_FILES of the adapter in the folder `source` into the folder `target`. Raises: OSError, ConfigError."""
    if not has_stacked_experts(source / WEIGHTS_FILE):
        for name in PEFT_FILES:
            shutil.copyfile(source / name, target / name)
        return
    with TensorFile(source / WEIGHTS_FILE) as file:
        fused = file.metadata.get(BASE_EXPERTS) == FUSED
    if fused:
        write_parameters(source / WEIGHTS_FILE, target / WEIGHTS_FILE)
        config = parameters_config(json.loads((source / CONFIG_FILE).read_text()))
        (target / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    else:
        expand_experts(source / WEIGHTS_FILE, target / WEIGHTS_FILE)
        shutil.copyfile(source / CONFIG_FILE, target / CONFIG_FILE)
