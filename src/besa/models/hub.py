"""Fetching a model from the Hugging Face Hub: only the files that are needed."""

from __future__ import annotations

import json
import re
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from besa.storage.weights import INDEX, SPARSE_STEM, STEM

# Names of the files that belong to a model beside its weights: configurations, model code, chat templates, tokenizers.
CONFIGURATIONS = ("*.json", "*.txt", "*.jinja", "*.py")
TOKENIZERS = ("*.model", "tokenizer.model.*", "*.tiktoken", "*.bpe", "*.codes", "*.vocab", "*.spm")
LICENCES = r"(?i)(licen[cs]e|notice|copying|use[-_]policy)"  # beginnings of their names
CARD = "README.md"  # of a model; fetched for the licence that it names, and never passed on
TEMPLATES = "additional_chat_templates/*.jinja"
ADAPTER = "adapter_config.json"  # of an adapter beside the model: peft would load the adapter and its own base


def fetch(model: str, revision: str | None = None) -> Path:
    """The folder of a model's files in the local cache; missing files are downloaded.

    The weights are those that transformers would load: ``model.safetensors``, or else the shards of its index. Weights
    in other formats and files in subfolders are left out. Without a connection, the cache must have all files.

    Args:
        model: Hugging Face id.
        revision: branch, tag or commit, None for the default branch.

    Raises:
        Exception: of huggingface_hub: there is no such model, no access to it, or no connection.
    """
    try:
        names = [file.rfilename for file in HfApi().model_info(model, revision=revision).siblings or []]
    except Exception as error:  # connection errors of huggingface_hub share no base class
        try:
            cached = snapshot_download(model, revision=revision, allow_patterns=["config.json"], local_files_only=True)
            return Path(cached)
        except LocalEntryNotFoundError:
            raise error from None
    files = [name for name in names if belongs(name) or name == CARD]
    stem = next((stem for stem in (STEM, SPARSE_STEM) if {f"{stem}.safetensors", f"{stem}{INDEX}"} & {*names}), STEM)
    if f"{stem}.safetensors" in names:
        files.append(f"{stem}.safetensors")
    elif f"{stem}{INDEX}" in names:
        index = Path(hf_hub_download(model, f"{stem}{INDEX}", revision=revision))
        files += _shards(index)
    return Path(snapshot_download(model, revision=revision, allow_patterns=files))


def belongs(name: str) -> bool:
    """Whether a file belongs to a model beside its weights.

    Args:
        name: of the file, relative to the model's folder.
    """
    path = Path(name)
    if len(path.parts) > 1:
        return path.match(TEMPLATES)
    matches = any(path.match(pattern) for pattern in (*CONFIGURATIONS, *TOKENIZERS))
    return (matches and name != ADAPTER) or re.match(LICENCES, name) is not None


def _shards(index: Path) -> list[str]:
    """Names of the shards of an index; none for a damaged index, which is refused when the folder is opened."""
    try:
        return sorted({str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
