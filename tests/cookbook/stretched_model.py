"""A second base model: the tiny one with two more tokens and a longer context.

The cookbook's renderers for Qwen3.5 need <think> and </think> to be one token each, and some of its prompts are longer
than the tiny base's 1024 tokens. The new rows are zero, so the two tokens are never likely; positions beyond 1024 were
never trained on, so text far into a long prompt is noise. Recipes run with it, they do not learn to think.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NEW_TOKENS = ("<think>", "</think>")


def write(source: Path, target: Path, *, max_context: int) -> None:
    """Write the stretched copy of the model in `source`."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = tensors[name]
        tensors[name] = torch.cat([rows, rows.new_zeros(len(NEW_TOKENS), rows.shape[1])])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})

    config = json.loads((source / "config.json").read_text())
    config["max_position_embeddings"] = max_context
    config["vocab_size"] += len(NEW_TOKENS)
    (target / "config.json").write_text(json.dumps(config))

    tokenizer = json.loads((source / "tokenizer.json").read_text())
    first = len(tokenizer["model"]["vocab"])
    for number, token in enumerate(NEW_TOKENS, first):
        like = {**tokenizer["added_tokens"][0], "id": number, "content": token, "special": False}
        tokenizer["added_tokens"].append(like)
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["model_max_length"] = max_context
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
