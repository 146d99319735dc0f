"""Shrinking: writing a checkpoint without what nothing reads: feed-forward channels, heads, and whole blocks.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, S structures, K structures that stay.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from besa.checkpoint.companions import CONFIG, read_config_json, with_settings
from besa.checkpoint.rewriting import folder_of, local, rewrite, size_of
from besa.checkpoint.shallower import Renumbering, is_empty
from besa.checkpoint.writer import disk_bytes
from besa.counting.precision import dtype_name
from besa.data.arguments import checked
from besa.errors import BesaError
from besa.models import widths
from besa.models.blocks import Block
from besa.models.couplings import CALLED, Kind, alike, couplings, take_out
from besa.models.ends import capture_inputs
from besa.models.finding import find_blocks
from besa.models.loading import is_quantized, read_config, skeleton
from besa.models.source import Source
from besa.models.streaming import DecoderOnDisk
from besa.progress import Progress, silent
from besa.storage.entry import besa_entry
from besa.storage.formats.container import open_files, refuse_packed
from besa.storage.weights import FLOATS, STEM, WIDTHS_STEM, WeightFiles
from besa.storage.writing import appearing, check_space

CPU = torch.device("cpu")
TOKENS = 32  # length of the sequence on which the smaller blocks are compared with the original ones
WITHOUT_ATTENTION = "only be called on Attention layers"  # what transformers says of a cache that counts no tokens
TOLERANCE = 8  # machine epsilons, relative to the norm of a block's output, because sums are taken in another order

Kept = dict[Kind, dict[int, Tensor]]


class Shrinking(BaseModel):
    """What shrinking did to a checkpoint.

    Attributes:
        structures: number in each block before and after, by kind: feed-forward channels (``ffn``), key-value heads
            (``heads``); empty if blocks keep different numbers.
        widths: number in each block after, by kind, if blocks keep different numbers.
        blocks: number before and after.
        file_bytes_before: of all weight files of the model.
        file_bytes: of all weight files that were written.
    """

    structures: dict[Kind, tuple[int, int]]
    widths: dict[Kind, list[int]] = {}
    blocks: tuple[int, int]
    file_bytes_before: int
    file_bytes: int = 0


@dataclass(frozen=True)
class _Smaller:
    """What stays of a model.

    Attributes:
        blocks: those that stay.
        numbers: structures of a block before, by kind; of kinds of which some go.
        kept: indices (K,) of those that stay, by kind and number of the block before.
    """

    blocks: Renumbering
    numbers: dict[Kind, int]
    kept: Kept

    def widths(self, kind: Kind) -> list[int]:
        """How many structures of a kind each block keeps."""
        return [len(self.kept[kind][block.index]) for block in self.blocks.staying]

    @property
    def uneven(self) -> bool:
        """Whether blocks keep different numbers."""
        return any(len(set(self.widths(kind))) > 1 for kind in self.kept)

    def removed_bytes(self, decoder: DecoderOnDisk) -> int:
        """The bytes that go, biases of channels aside."""
        removed = 0
        for block in decoder.blocks:
            if block.index in self.blocks.gone:
                removed += sum(parameter.numel() for parameter in block.module.parameters())
                continue
            for coupling in couplings(block) if self.kept else ():
                if coupling.kind in self.kept:
                    gone = coupling.structures - len(self.kept[coupling.kind][block.index])
                    removed += gone * coupling.weights
        return removed * int(decoder.model.dtype.itemsize)

    def take_out(self, block: Block, device: torch.device) -> None:
        """Make a block smaller in place."""
        for coupling in couplings(block):
            if coupling.kind in self.kept:
                take_out(block, coupling, self.kept[coupling.kind][block.index].to(device))


@checked
def shrink(
    model: str | Path,
    out: str | Path,
    *,
    by_block: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Shrinking:
    """Write a checkpoint without its unread feed-forward channels and heads, and without blocks that do nothing.

    A channel or head is unread if only zero columns read it, whichever method pruned it. Its biases are removed too. A
    block does nothing if all its matrices and their biases are zero. Before the folder appears, the smaller blocks are
    run and compared with the original ones.

    Args:
        model: Hugging Face id or local folder: dense safetensors.
        out: folder to write; must not exist.
        by_block: each block keeps its own number of channels and heads, at least one, and transformers loads the folder
            only where besa is installed; else every block loses as many as the block with the fewest unread ones.
        trust_remote_code: run model code that comes with the checkpoint.
        progress: called with (parts done, number of parts, name of the part).

    Raises:
        BesaError: the model cannot be read, has nothing to remove, the family's configuration cannot describe the
            smaller shapes, or `out` exists or cannot be written.
    """
    source = local(model, out, progress, trust_remote_code)
    _check_dense(source, str(model))
    files = open_files(folder_of(source))
    decoder = DecoderOnDisk(source, _dtype_of(files), files)
    decoder.dtype = None  # every tensor is written in the dtype it has
    decoder.check_writable()
    smaller = _smaller(decoder, str(model), by_block)
    config = _smaller_config(source, decoder, smaller)
    done = _outcome(smaller, len(decoder.blocks), size_of(files.paths))
    config["besa"] = _entry(besa_entry(config), done)
    with appearing(Path(out)) as folder:
        check_space(Path(out), disk_bytes(done.file_bytes_before - smaller.removed_bytes(decoder)))
        rewrite(source, folder, _parts(decoder, smaller, progress), config, WIDTHS_STEM if smaller.uneven else STEM)
        written = DecoderOnDisk(replace(source, name=str(out), location=str(folder)))
        _check_attention(decoder.model, written.model)
        _compare(DecoderOnDisk(source), written, smaller.blocks, progress)
        done.file_bytes = size_of(folder.glob("*.safetensors"))
    return done


def _check_dense(source: Source, model: str) -> None:
    """Check that the weights are plain numbers, and all blocks as wide.

    Raises:
        BesaError: they are packed or codes, or blocks were shrunk to widths of their own.
    """
    refuse_packed(folder_of(source), model)
    config = read_config(source)
    if is_quantized(config):
        raise BesaError(
            f"{model} is quantised and cannot be shrunk: shrink before quantising, or what `besa prune --dequantized` "
            "writes."
        )
    widths.refuse(source.name, config)


def _dtype_of(files: WeightFiles) -> str:
    """The narrowest floating-point format that holds every number of the files; float32 if there is none."""
    formats = {FLOATS[name] for name in files.dtypes().values() if name in FLOATS}
    return dtype_name(reduce(torch.promote_types, formats or {torch.float32}))


def _smaller(decoder: DecoderOnDisk, model: str, by_block: bool) -> _Smaller:
    """What stays of the model.

    Raises:
        BesaError: nothing can be removed.
    """
    empty = []
    for block in decoder.blocks:
        with decoder.opened(block, CPU):
            if is_empty(block):
                empty.append(block.index)
    blocks = Renumbering(decoder.blocks, empty)
    if not blocks.staying:
        raise BesaError(f"{model} has no block that does anything: nothing would be left of it.")
    try:
        known = alike(blocks.staying)
    except BesaError:
        if not empty:
            raise
        known = []
    unread: dict[Kind, dict[int, Tensor]] = {coupling.kind: {} for coupling in known}
    for block in blocks.staying:
        with decoder.opened(block, CPU):
            for coupling in couplings(block) if known else ():
                weights = {name: block.weight(name) for name in coupling.columns}
                unread[coupling.kind][block.index] = coupling.unread(weights)
    numbers = {coupling.kind: coupling.structures for coupling in known}
    kept: Kept = {}
    for kind, by_index in unread.items():
        counts = {index: min(int(unread_S.sum()), numbers[kind] - 1) for index, unread_S in by_index.items()}
        if not by_block:
            counts = dict.fromkeys(counts, min(counts.values()))
        if any(counts.values()):
            kept[kind] = {index: _without_first(by_index[index], count) for index, count in counts.items()}
    if not kept and not empty:
        kinds = " or ".join(CALLED[coupling.kind] for coupling in known)
        some = not by_block and any(bool(unread_S.any()) for each in unread.values() for unread_S in each.values())
        advice = (
            "let each block keep its own number with --by-block"
            if some
            else "prune with allocation.method=structured first"
        )
        raise BesaError(f"{model} has blocks without unread {kinds}: {advice}.")
    return _Smaller(blocks, {kind: numbers[kind] for kind in kept}, kept)


def _without_first(unread_S: Tensor, number: int) -> Tensor:
    """Indices (K,) of all structures but the first `number` unread ones."""
    stay_S = torch.ones_like(unread_S)
    stay_S[unread_S.nonzero().flatten()[:number]] = False
    return stay_S.nonzero().flatten()


def _smaller_config(source: Source, decoder: DecoderOnDisk, smaller: _Smaller) -> dict[str, Any]:
    """The config.json of the smaller model.

    Raises:
        BesaError: a model made from it has other shapes or blocks than the tensors that will be written.
    """
    config = read_config_json(folder_of(source))
    like = read_config(source)
    with torch.device("meta"):
        written = skeleton(source, like)
    if smaller.blocks.gone:
        config = smaller.blocks.config(config, like)
        described = _described(source, decoder, config)
        names = smaller.blocks.in_model(written.state_dict())
        shapes = {names[name]: shape for name, shape in _shapes(written.state_dict()).items() if name in names}
        if described is None or _shapes(described.state_dict()) != shapes:
            raise BesaError(
                f"{source.name} is a {like.model_type} model, whose configuration cannot describe it without blocks "
                f"{', '.join(map(str, sorted(smaller.blocks.gone)))}: choose others with --skip."
            )
        Renumbering(find_blocks(written), smaller.blocks.gone).check_same(find_blocks(described))
        like, written = described.config, described
    for block, old in zip(find_blocks(written), smaller.blocks.staying, strict=True):
        for coupling in couplings(block):
            if coupling.kind in smaller.kept:
                take_out(block, coupling, smaller.kept[coupling.kind][old.index].to("meta"))
    if smaller.uneven:
        by_block = {kind: smaller.widths(kind) for kind in smaller.kept}
        config |= widths.settings(by_block, sharded=False)
    else:
        for coupling in couplings(smaller.blocks.staying[0]):
            if coupling.kind in smaller.kept:
                fewer = coupling.settings(like.get_text_config(), smaller.widths(coupling.kind)[0])
                config = with_settings(config, fewer, like)
    described = _described(source, decoder, config)
    if described is None or _shapes(described.state_dict()) != _shapes(written.state_dict()):
        raise BesaError(
            f"{source.name} is a {like.model_type} model, whose configuration cannot describe fewer "
            f"{' and '.join(CALLED[kind] for kind in smaller.kept)}."
        )
    return config


def _outcome(smaller: _Smaller, blocks: int, file_bytes: int) -> Shrinking:
    """What will be done to a checkpoint.

    Args:
        smaller: what stays of it.
        blocks: number before.
        file_bytes: of its weight files.
    """
    even = {kind: (smaller.numbers[kind], smaller.widths(kind)[0]) for kind in smaller.kept}
    uneven = {kind: smaller.widths(kind) for kind in smaller.kept}
    return Shrinking(
        structures={} if smaller.uneven else even,
        widths=uneven if smaller.uneven else {},
        blocks=(blocks, len(smaller.blocks.staying)),
        file_bytes_before=file_bytes,
    )


def _entry(earlier: Mapping[str, Any], done: Shrinking) -> dict[str, Any]:
    """besa's entry of config.json, with the numbers before the first shrinking and after this one.

    Args:
        earlier: the entry of the model that is shrunk.
        done: to it.
    """
    first = earlier.get("shrunk", {})
    removed = first | {kind: (first.get(kind, sizes)[0], sizes[1]) for kind, sizes in done.structures.items()}
    before, after = done.blocks
    if after < before:
        removed["blocks"] = (first.get("blocks", done.blocks)[0], after)
    return {**earlier, "shrunk": removed}


def _parts(decoder: DecoderOnDisk, smaller: _Smaller, progress: Progress) -> Iterator[dict[str, Tensor]]:
    """The tensors of the smaller model by their names in its files: block by block, then those outside blocks."""
    for block in smaller.blocks.staying:
        with decoder.opened(block, CPU):
            smaller.take_out(block, CPU)
            yield smaller.blocks.in_files(block, decoder.stored(block))
        progress(block.index + 1, 2 * len(decoder.blocks), block.name)
    for name, tensor in decoder.tensors_outside_blocks():
        yield {smaller.blocks.outside(name): tensor}


def _described(source: Source, decoder: DecoderOnDisk, config: dict[str, Any]) -> PreTrainedModel | None:
    """The model of a config.json, on the meta device; None if its family refuses it."""
    with tempfile.TemporaryDirectory() as folder:  # read as from a checkpoint: in a file, infinity is an object
        (Path(folder) / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        smaller = type(read_config(source)).from_pretrained(folder)
    smaller.dtype = decoder.model.dtype
    try:
        with torch.device("meta"):
            return skeleton(source, smaller)
    except BesaError:  # a family that checks its configuration
        return None


def _check_attention(before: PreTrainedModel, after: PreTrainedModel) -> None:
    """Check that attention stays where there was some: transformers asks it for the number of tokens so far.

    Raises:
        BesaError: all of it would go.
    """
    if _has_attention(before) and not _has_attention(after):
        raise BesaError(
            "No attention would stay, and transformers runs no such model: when you prune, leave out a block that has "
            "some by --skip."
        )


def _has_attention(model: PreTrainedModel) -> bool:
    """Whether a layer counts tokens in the cache of a model."""
    try:
        DynamicCache(config=model.config).get_seq_length()
    except ValueError as error:
        return WITHOUT_ATTENTION not in str(error)
    return True


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


@torch.no_grad()
def _compare(before: DecoderOnDisk, after: DecoderOnDisk, blocks: Renumbering, progress: Progress) -> None:
    """Run the blocks of both models on the same hidden states, with one pair in memory at a time.

    Raises:
        BesaError: the outputs of a pair differ by more than rounding, or a block that is left out does something.
    """
    vocabulary = before.model.get_input_embeddings().weight.shape[0]
    tokens_NT = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with before.embeddings(CPU):
        (x_NTC,) = capture_inputs(before.model, before.blocks, tokens_NT, 1)
    with after.embeddings(CPU):
        list(capture_inputs(after.model, after.blocks, tokens_NT, 1))  # for the arguments of its blocks
    pairs = iter(after.blocks)
    for block in before.blocks:
        with before.opened(block, CPU):
            y_NTC = block(x_NTC)
            if block.index in blocks.gone:
                if not torch.equal(y_NTC, x_NTC):
                    raise BesaError(f"{block.name} has only zeros and still does something: it cannot be left out.")
                continue
            smaller = next(pairs)
            with after.opened(smaller, CPU):
                try:
                    smaller_NTC = smaller(x_NTC)
                except (MemoryError, torch.OutOfMemoryError):
                    raise
                except Exception:  # the model's own code, in which something is as wide as it was
                    smaller_NTC = torch.full_like(y_NTC, torch.nan)
        allowed = TOLERANCE * torch.finfo(y_NTC.dtype).eps * float(y_NTC.float().norm())
        if not float((smaller_NTC.float() - y_NTC.float()).norm()) <= allowed:
            raise BesaError(
                f"{block.name} computes something else with smaller matrices: the zeros of this model cannot be "
                "removed from it."
            )
        x_NTC = y_NTC
        progress(len(before.blocks) + block.index + 1, 2 * len(before.blocks), f"{block.name} compared")
