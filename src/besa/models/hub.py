"""Fetching a model from the Hugging Face Hub: the files that are needed, and no others."""

from __future__ import annotations

import json
import re
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from besa.storage.weights import INDEX, SPARSE_STEM, STEM

# What belongs to a model beside its weights, by name: configurations, model code, chat templates, tokenizers.
CONFIGURATIONS = ("*.json", "*.txt", "*.jinja", "*.py")
TOKENIZERS = ("*.model", "tokenizer.model.*", "*.tiktoken", "*.bpe", "*.codes", "*.vocab", "*.spm")
LICENCES = r"(?i)(licen[cs]e|notice|copying|use[-_]policy)"  # how their names begin
TEMPLATES = "additional_chat_templates/*.jinja"
ADAPTER = "adapter_config.json"  # of an adapter beside the model; peft would look for its weights, and its own base


def fetch(model: str, revision: str | None = None) -> Path:
    """The folder of a model's files in the local cache, downloaded where they are not there yet.

    Of the weights come those that transformers would load: ``model.safetensors``, or else the shards of its index.
    Nothing comes from subfolders, and no weights in other formats. Without a connection the cache must have them all.

    Args:
        model: Hugging Face id.
        revision: branch, tag or commit, None for the default branch.

    Raises:
        Exception: as huggingface_hub does: there is no such model, no access to it, or no connection.
    """
    try:
        names = [file.rfilename for file in HfApi().model_info(model, revision=revision).siblings or []]
    except Exception as error:  # its errors of connections have no base class of their own
        try:
            cached = snapshot_download(model, revision=revision, allow_patterns=["config.json"], local_files_only=True)
            return Path(cached)
        except LocalEntryNotFoundError:
            raise error from None
    wanted = [name for name in names if belongs(name)]
    stem = next((stem for stem in (STEM, SPARSE_STEM) if {f"{stem}.safetensors", f"{stem}{INDEX}"} & {*names}), STEM)
    if f"{stem}.safetensors" in names:
        wanted.append(f"{stem}.safetensors")
    elif f"{stem}{INDEX}" in names:
        index = Path(hf_hub_download(model, f"{stem}{INDEX}", revision=revision))
        wanted += _shards(index)
    return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))


def belongs(name: str) -> bool:
    """Whether a file belongs to a model beside its weights.

    Args:
        name: of the file, relative to the model's folder.
    """
    path = Path(name)
    if len(path.parts) > 1:
        return path.match(TEMPLATES)
    named_so = any(path.match(pattern) for pattern in (*CONFIGURATIONS, *TOKENIZERS))
    return (named_so and name != ADAPTER) or re.match(LICENCES, name) is not None


def _shards(index: Path) -> list[str]:
    """Names of an index's files; of a damaged index none, as whoever opens the folder says what is wrong with it."""
    try:
        return sorted({str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
