"""A base model's name -> the folder that holds it, and the few facts about it that need no tensors.

One rule for everybody (gateway, worker, CLI, demo), in this order:
`[base_models]` in the configuration, an existing folder, the Hugging Face cache, a download where that is allowed.
Imports neither torch nor transformers: it runs on login nodes and inside `tinker-hpc --help`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinker_hpc.errors import ConfigError, UnknownBaseModelError, WeightsError
from tinker_hpc.model_config import NUM_EXPERTS_KEYS, checked, language_model
from tinker_hpc.model_folder import HUB_FILES, weight_files

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class BaseModel:
    """A base model on disk.

    Attributes:
        name: as the user gave it if that is a hub name, else the folder's absolute path (`public_name`).
        folder: holds config.json, *.safetensors and the tokenizer.
        config: config.json as a dict.
        vocab_size: rows of the embedding; token ids are 0 ... vocab_size - 1. Padding rows count.
        max_context: longest sequence the positions were made for, in tokens.
        hidden_size: width of the residual stream; an upper bound of a useful LoRA rank.
        model_type: Hugging Face's word for the architecture: "llama", "qwen2", "qwen3", ...
    """

    name: str
    folder: Path
    config: dict[str, Any] = field(repr=False)
    vocab_size: int
    max_context: int
    hidden_size: int
    model_type: str

    @property
    def num_experts(self) -> int:
        """Of a layer; 0 for a model without."""
        text = language_model(self.config)
        return next((int(text[name]) for name in NUM_EXPERTS_KEYS if text.get(name)), 0)

    @property
    def tokenizer_name(self) -> str:
        """What transformers' AutoTokenizer can load anywhere on this filesystem: the folder."""
        return str(self.folder)


def resolve(name: str, mapping: Mapping[str, str] | None = None, *, weights: bool = True) -> BaseModel:
    """Find the base model `name` and read its config.json.

    Args:
        name: a folder (absolute, relative to here, or with ~) or a hub name ("Qwen/Qwen3-8B").
        mapping: `[base_models]` of the configuration: name -> folder.
        weights: whether its weights must be there too, and are downloaded where they are not. Without, config.json is
            enough and the one file that is downloaded. HF_HUB_OFFLINE=1 forbids both.

    Raises: UnknownBaseModelError, listing every place searched and what to do next; or naming the files that are
        missing of a folder that was given.
    """
    searched: list[str] = []
    mapped = (mapping or {}).get(name)
    if mapped is not None:
        folder = _expanded(mapped)
        if folder.is_dir():
            return _with_weights(read(name, folder.resolve()), weights)
        searched.append(f"[base_models] in the configuration says {mapped}, which is not a folder")
    else:
        searched.append(f"[base_models] in the configuration has no {name!r}")

    folder = _expanded(name)
    if folder.is_dir():
        return _with_weights(read(public_name(name, folder), folder.resolve()), weights)
    searched.append(f"no folder {folder.absolute()}")

    if not HUB_NAME.fullmatch(name):
        searched.append("not a hub name (organisation/model), so the hub was not asked")
        raise _unknown(name, searched)
    cached = _in_cache(name, searched, weights)
    if cached is not None:
        return read(name, cached)
    if _offline():
        searched.append("the hub was not asked: HF_HUB_OFFLINE=1")
        raise _unknown(name, searched)
    return read(name, _download(name, searched, HUB_FILES if weights else ("config.json",)))


def read(name: str, folder: Path) -> BaseModel:
    """The base model in `folder`, facts from its config.json.

    Raises: UnknownBaseModelError if config.json is missing, broken or lacks a field.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnknownBaseModelError(
            f"base model {name!r}: {folder} has no config.json. Give the folder that holds config.json and the "
            "*.safetensors files (of a hub cache: .../snapshots/<revision>).",
            name=name,
        ) from None
    except (OSError, ValueError) as error:
        raise UnknownBaseModelError(
            f"base model {name!r}: cannot read {path}: {error}. Copy or download the model again.", name=name
        ) from error
    try:
        config = checked(config, str(path))
    except ConfigError as error:
        raise UnknownBaseModelError(f"base model {name!r}: {error}", name=name) from error
    text = language_model(config)
    facts: dict[str, int] = {}
    for key in ("vocab_size", "max_position_embeddings", "hidden_size"):
        value = text.get(key, config.get(key))
        if not isinstance(value, int) or value < 1:
            raise UnknownBaseModelError(
                f"base model {name!r}: {path} has {key}={value!r}, expected a positive integer. "
                "Is this the config.json of a Hugging Face language model?",
                name=name,
            )
        facts[key] = value
    return BaseModel(
        name=name,
        folder=folder,
        config=config,
        vocab_size=facts["vocab_size"],
        max_context=facts["max_position_embeddings"],
        hidden_size=facts["hidden_size"],
        model_type=str(text.get("model_type") or config.get("model_type") or "unknown"),
    )


def _with_weights(model: BaseModel, weights: bool) -> BaseModel:
    """The same model. Raises: UnknownBaseModelError if weights are asked for and its folder lacks some."""
    if not weights:
        return model
    try:
        weight_files(model.folder)
    except WeightsError as error:
        raise UnknownBaseModelError(f"base model {model.name!r}: {error}", name=model.name) from error
    return model


def public_name(name: str, folder: Path) -> str:
    """The name a model goes by: a hub name as it is, a path as absolute path in a form the SDK does not misread.

    `SamplingClient.get_tokenizer` takes any name with exactly two slashes for organisation/model/variant and drops
    the last part (tinker 0.38, lib/public_interfaces/sampling_client.py); a slash at the end makes it three.
    """
    if HUB_NAME.fullmatch(name):
        return name
    path = str(folder.resolve())
    return path + "/" if path.count("/") == 2 else path


def same_model(asked: str, served: str, served_folder: str | Path, mapping: Mapping[str, str] | None = None) -> bool:
    """Whether the base model name `asked` means the one `served` from `served_folder`.

    True for its name, any path to its folder, and a relative path (or last part) of it: whoever asks may have been
    started in another directory.
    """
    if asked == served:
        return True
    parts = Path(asked).parts
    if parts and Path(served_folder).parts[-len(parts) :] == parts:
        return True
    for candidate in ((mapping or {}).get(asked), asked):  # the order of resolve()
        if candidate and os.path.isdir(_expanded(candidate)):
            return _expanded(candidate).resolve() == Path(served_folder).resolve()
    return False


def _expanded(path: str) -> Path:
    """With ~ and ~user replaced; of a user that there is not it stays as it is, where Path.expanduser raises."""
    return Path(os.path.expanduser(path))


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _in_cache(name: str, searched: list[str], weights: bool) -> Path | None:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        searched.append(f"not in the Hugging Face cache {constants.HF_HUB_CACHE}")
        return None
    if not weights:
        return folder
    try:
        weight_files(folder)
    except WeightsError as error:  # a download that was cut short, or of config.json alone: what is missing is got
        searched.append(f"not whole in the Hugging Face cache: {error}")
        return None
    return folder


def _download(name: str, searched: list[str], files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the hub's client raises httpx, OSError and its own errors; the words are what helps
        searched.append(f"the hub answered: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        raise _unknown(name, searched) from error


def _unknown(name: str, searched: list[str]) -> UnknownBaseModelError:
    places = "; ".join(searched)
    return UnknownBaseModelError(
        f"unknown base model {name!r}. Searched: {places}. Give a folder with config.json and *.safetensors, "
        "add the name under [base_models] in the configuration file, or download it first where there is internet: "
        f"hf download {name if HUB_NAME.fullmatch(name) else 'ORGANISATION/MODEL'}",
        name=name,
        searched=tuple(searched),
    )
