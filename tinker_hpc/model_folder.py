"""The files that a Hugging Face model's folder is made of, by their names; nothing of the weights is read."""

from __future__ import annotations

import json
from pathlib import Path

from tinker_hpc.errors import WeightsError

INDEX = "model.safetensors.index.json"
# What a model folder needs to be loaded; the rest of a hub repository (originals, GGUF, images) can be huge.
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def weight_files(folder: Path) -> list[Path]:
    """Where the weights are: model.safetensors, or the shards that the index names.

    Raises: WeightsError if there is neither, the index cannot be read, or shards are missing; names them.
    """
    index = folder / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index} is not an index of shards: {error!r}. Download the model again.") from error
    elif (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    else:
        raise WeightsError(
            f"{folder} holds neither model.safetensors nor {INDEX}. Only safetensors are read; "
            "convert other formats with transformers' save_pretrained."
        )
    if missing := [name for name in names if not (folder / name).exists()]:
        raise WeightsError(f"{index} names files that are not there: {listing(missing)}. Download the model again.")
    return [folder / name for name in names]


def listing(names: list[str], limit: int = 8) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
