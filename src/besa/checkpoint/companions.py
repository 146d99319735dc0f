"""The files that belong to a model beside its weights: copied to the byte."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from besa.checkpoint.own_code import modules_of, named
from besa.errors import BesaError, Notice
from besa.models.hub import belongs
from besa.storage.companion_names import CODE, TEMPLATES, is_licence, is_read
from besa.storage.names import path_of
from besa.storage.writing import write_file

CONFIG = "config.json"
OWN = "besa_*.json"  # besa's records and measurements, which are valid for the files beside them only
WRITTEN = (CONFIG, "*.index.json", OWN)  # files that besa writes itself


def read_config_json(folder: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        BesaError: the file is no JSON object.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise BesaError(f"{folder / CONFIG} is no JSON object: the file is damaged.")
    return config


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A configuration with another dtype, under the key that it uses for it; parts of a wrapper have their own keys."""
    changed = _with_dtype(config, dtype)
    return changed if {"dtype", "torch_dtype"} & changed.keys() else changed | {"dtype": dtype}


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    changed = {key: _with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    return changed | {key: dtype for key in ("dtype", "torch_dtype") if key in config}


def with_settings(config: dict[str, Any], settings: Mapping[str, int], like: PreTrainedConfig) -> dict[str, Any]:
    """A configuration with other values for keys of the text decoder, under the names that the file has for them.

    Args:
        config: content of config.json.
        settings: new values by key.
        like: the configuration of the model, which knows other names of its keys. Of a wrapper, it may be that of the
            text decoder inside.
    """
    text = like.get_text_config()
    names = {other: key for other, key in text.attribute_map.items() if key in settings} | {
        key: key for key in settings
    }
    inside = next((key for key in like.sub_configs if key in config and getattr(like, key, None) is text), None)
    if inside is None and config.get("model_type") != text.model_type:
        parts = {key: value for key, value in config.items() if isinstance(value, dict)}
        inside = next((key for key, part in parts.items() if part.get("model_type") == text.model_type), None)
    if inside is not None:
        return config | {inside: with_settings(config[inside], settings, text)}
    known = {name: settings[key] for name, key in names.items() if name in config}
    return config | known | {key: value for key, value in settings.items() if key not in {names[n] for n in known}}


def pass_on(source: Path, folder: Path, config: dict[str, Any], also: Iterable[str] = ()) -> None:
    """Copy the files that belong to a model beside its weights, and write its configuration.

    Tokenizer files, generation and processor configurations, chat templates, model code with the files that it names,
    and licences are copied; weights in any format are not, and neither is what a user keeps there. A notice names what
    stays behind of a model with code of its own, which may read it under a name that it makes up.

    Args:
        source: folder of a model.
        folder: to fill.
        config: content of config.json.
        also: names of further files to copy if they exist.

    Raises:
        BesaError: a file is a link out of the folder.
    """
    own = companions(source)
    for path in [*own, *(source / name for name in also if (source / name).is_file())]:
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    write_file(folder / CONFIG, _as_json(config))
    left = [path.name for path in _candidates(source) if path not in own and not _is_written(path)]
    if left and any(path.match(CODE) for path in own):
        warnings.warn(
            f"{', '.join(left)} of {source} were not copied, as neither configuration nor model code names them: copy "
            "what the code reads.",
            Notice,
            stacklevel=2,
        )


def _as_json(config: dict[str, Any]) -> str:
    """The text of a config.json. Half surrogate pairs stay escaped, because no UTF-8 file can hold them."""
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return re.sub(r"[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def companions(folder: Path) -> list[Path]:
    """The files of a model's folder that belong to it beside its weights, except those that besa writes itself.

    They are known by their names, or a configuration or the model's code names them: texts and notes of a user do not
    belong to the model.

    Raises:
        BesaError: one is a link out of the folder, also of those that besa writes, or its name is no text.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in _candidates(folder)}
    modules = modules_of(folder)
    code = {name for name, path in paths.items() if path.match(CODE)}
    known = {name for name in paths.keys() - code if is_read(name) or is_licence(name)}
    known |= modules | named(folder, modules, paths.keys() - code - known)
    files = []
    for name, path in paths.items():
        written = _is_written(path)
        if written or name in known:
            _refuse_foreign(path_of(path), folder)
        if name in known and not written:
            files.append(path)
    return files


def _candidates(folder: Path) -> list[Path]:
    """The files of a model's folder that may belong to it beside its weights."""
    paths = sorted([*folder.iterdir(), *folder.glob(TEMPLATES)])
    return [path for path in paths if belongs(path.relative_to(folder).as_posix()) and path.is_file()]


def _is_written(path: Path) -> bool:
    """Whether besa writes a file of this name itself."""
    return any(path.match(pattern) for pattern in WRITTEN)


def _refuse_foreign(path: Path, source: Path) -> None:
    """Refuse a link to a file outside the model's folder and the stores of the Hugging Face cache.

    Raises:
        BesaError: the path is such a link.
    """
    homes = [source.resolve()]
    if source.resolve().parent.name == "snapshots":  # of the cache: models--a--b/snapshots/commit
        repository = source.resolve().parent.parent
        homes += [repository / "blobs", repository.parent / "blobs"]  # the latter holds what repositories share
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise BesaError(f"{path} is a link to a file outside the model's folder: put a copy of the file in its place.")
