"""Writing the checkpoint of a run: dense safetensors with zeros, which plain ``from_pretrained`` loads."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import GENERATION_CONFIG_NAME

from besa.checkpoint.cards import write_card
from besa.checkpoint.companions import pass_on, read_config_json, with_dtype, with_settings
from besa.checkpoint.provenance import label, staying
from besa.checkpoint.verification import seal
from besa.counting.precision import dtype_name
from besa.errors import BesaError
from besa.models.quiet import quiet
from besa.models.streaming import Decoder
from besa.quantization import Coding
from besa.record import RECORD_NAME, RunRecord
from besa.storage.formats.codes import quantization_config
from besa.storage.journal import Journal
from besa.storage.tensors import join_tensors, read_header, save_tensors
from besa.storage.weights import STEM
from besa.storage.writing import explained, write_file

ONE_FILE = 4 << 30  # bytes of weights up to which they are in one file; beyond, each block is a shard


def disk_bytes(size: int) -> int:
    """Most bytes on the disk during a run, for a checkpoint of `size` bytes; a single file is joined from its parts."""
    return 2 * size if size <= ONE_FILE else size


def finish(
    journal: Journal,
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    record: RunRecord,
    out: Path,
    quantization: Coding | None = None,
) -> None:
    """Make the checkpoint from the blocks in the journal and the rest of the model; `out` appears complete.

    The sparsity is in config.json, under the key ``besa``.

    Args:
        journal: of all blocks.
        decoder: has all other tensors of the model.
        tokenizer: of the model.
        record: of the run.
        out: must not exist.
        quantization: settings of the codes in the journal; None if it holds dense weights.

    Raises:
        BesaError: the checkpoint cannot be written; the journal stays.
    """
    folder = journal.assembly
    with explained(out):
        folder.mkdir()
        rest = journal.final_rest()
        parts = [
            _save_outside_blocks(journal.folder, decoder, rest),
            *(journal.final_path(block.index) for block in decoder.blocks),
        ]
        assemble(folder, parts)
        added = _about(decoder, record, quantization, staying(decoder, rest))
        if decoder.folder is None:
            _serialise(folder, decoder.model, tokenizer, added)
        else:
            config = read_config_json(decoder.folder)
            if decoder.dtype is not None:
                config = with_dtype(config, decoder.dtype)
            config = with_settings(config, decoder.settings, decoder.model.config)
            pass_on(decoder.folder, folder, config | added)
        write_file(folder / RECORD_NAME, record.model_dump_json(indent=2) + "\n")
        write_card(folder, decoder.folder)
        seal(folder)
        if os.path.lexists(out):
            raise BesaError(f"Another program created {out} during the run: rename it, then run again with --resume.")
        folder.rename(out)
    journal.finished = True


def _about(decoder: Decoder, record: RunRecord, quantization: Coding | None, before: dict[str, Any]) -> dict[str, Any]:
    """The keys that are added to the dense model's config.json.

    Linears outside the text decoder, such as a vision tower's, are no modules of the model. They are known by the names
    of their weights in the files.

    Args:
        decoder: of the pruned model.
        record: of the run.
        quantization: as of `finish`.
        before: what stays true of what besa had said of the model.
    """
    about: dict[str, Any] = {"besa": label(record) | {"record": RECORD_NAME} | before}
    if quantization is not None:
        quantized = {linear.name for block in record.blocks for linear in block.linears}
        plain = [name for name, part in decoder.model.named_modules() if isinstance(part, nn.Linear)]
        plain += [name.removesuffix(".weight") for name in decoder.unbuilt if name.endswith(".weight")]
        ignored = [name for name in plain if name not in quantized]
        about["quantization_config"] = quantization_config(quantization, ignored)
    return about


def _serialise(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, added: Mapping[str, Any]
) -> None:
    """Write the other files of a model in memory, which has no files to copy."""
    config = copy.deepcopy(model.config)  # the caller's stays as it is
    config.update({"architectures": [type(model).__name__], "dtype": dtype_name(model.dtype), **added})
    with quiet():
        if model._auto_class is not None:  # the model's code is its own
            custom_object_save(model, folder, config=config)
        config.save_pretrained(folder)
        # Written unchecked: its own save_pretrained refuses some settings that can be loaded.
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.to_json_file(folder / GENERATION_CONFIG_NAME, use_diff=True)
        tokenizer.save_pretrained(folder)


def _save_outside_blocks(folder: Path, decoder: Decoder, changed: Mapping[str, Tensor]) -> Path:
    """Write the tensors outside the blocks to one file, one tensor at a time: embeddings can be larger than a block.

    Args:
        folder: to write to.
        decoder: has the tensors.
        changed: those that the run has changed.
    """
    whole = folder / "rest.safetensors"
    parts: list[Path] = []
    for name, tensor in decoder.tensors_outside_blocks():
        parts.append(folder / f"rest-{len(parts):05}.safetensors")
        save_tensors(parts[-1], {name: changed.get(name, tensor)})
    join_tensors(whole, parts)
    for part in parts:
        part.unlink()
    return whole


def assemble(folder: Path, parts: list[Path], stem: str = STEM, about: Mapping[str, str] | None = None) -> None:
    """Assemble the weight files of a checkpoint from parts: one file, or, beyond 4 GiB, each part linked as a shard.

    Args:
        folder: of the checkpoint.
        parts: safetensors files on the same file system.
        stem: beginning of the names of weight files.
        about: further metadata, which the parts have already.
    """
    if sum(part.stat().st_size for part in parts) <= ONE_FILE:
        join_tensors(folder / f"{stem}.safetensors", parts, about)
        return
    places: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts, start=1):
        shard = folder / f"{stem}-{number:05}-of-{len(parts):05}.safetensors"
        try:
            os.link(part, shard)
        except OSError:  # a file system without links
            shutil.copyfile(part, shard)
        entries, start = read_header(part)
        places |= dict.fromkeys(entries, shard.name)
        total += part.stat().st_size - start
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_file(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")
