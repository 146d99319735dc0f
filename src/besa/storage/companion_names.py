"""Names of the files that belong to a model beside its weights.

It needs Python's own library alone, so that `besa doctor` can check where it writes.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

TEMPLATES = "additional_chat_templates/*.jinja"
TOKENIZERS = ("*.model", "tokenizer.model.*", "*.tiktoken", "*.bpe", "*.codes", "*.vocab", "*.spm")
CODE = "*.py"
# All that transformers, or other programs that run models, look for by these names.
READ = (
    "config.json", "generation_config.json", "*processor_config.json", "audio_tokenizer_config.json",
    "*.jinja", "chat_template.json", CODE,
    "tokenizer.json", "tokenizer.*.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "*tekken*.json", "vocab.json", "vocab-*.json", "*_vocab.json", "vocab.txt", "merges.txt", "dict.txt",
    "encoder.json", "emoji.json", "byte_maps.json", "normalizer.json", "word_shape.json", "word_pronunciation.json",
    "prophetnet.tokenizer", *TOKENIZERS,
)  # fmt: skip
LICENCES = r"(?i)(licen[cs]e|notice|copying|use[-_]policy)"  # beginnings of their names


def is_read(name: str) -> bool:
    """Whether a file decides what a model does, as far as its name tells.

    Args:
        name: of the file, relative to the model's folder.
    """
    path = PurePosixPath(name)
    if len(path.parts) > 1:
        return path.match(TEMPLATES)
    return any(fnmatchcase(name, pattern) for pattern in READ)


def is_licence(name: str) -> bool:
    """Whether a file, by its name, says what a model may be used for."""
    return "/" not in name and re.match(LICENCES, name) is not None
