"""Shrinking: writing a checkpoint without its unread feed-forward channels and heads, as smaller dense matrices.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, S structures, K structures that stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from besa.checkpoint.companions import read_config_json
from besa.checkpoint.rewriting import folder_of, local, rewrite, size_of
from besa.data.arguments import checked
from besa.errors import BesaError
from besa.models.blocks import capture_inputs, find_blocks
from besa.models.couplings import CALLED, Kind, alike, couplings, take_out
from besa.models.loading import Source, read_config, skeleton
from besa.models.streaming import DecoderOnDisk
from besa.progress import Progress, silent
from besa.storage.formats.container import header
from besa.storage.weights import STEM
from besa.storage.writing import appearing

CPU = torch.device("cpu")
TOKENS = 32  # length of the sequence on which the smaller blocks are compared with the original ones
TOLERANCE = 8  # machine epsilons, relative to the norm of a block's output, because sums are taken in another order

Kept = dict[Kind, list[Tensor]]


class Shrinking(BaseModel):
    """What shrinking did to a checkpoint.

    Attributes:
        structures: number in each block before and after, by kind: feed-forward channels (``ffn``), key-value heads
            (``heads``).
        file_bytes_before: of all weight files of the model.
        file_bytes: of all weight files that were written.
    """

    structures: dict[Kind, tuple[int, int]]
    file_bytes_before: int
    file_bytes: int = 0


@checked
def shrink(
    model: str | Path, out: str | Path, *, trust_remote_code: bool = False, progress: Progress = silent
) -> Shrinking:
    """Write a checkpoint without its unread feed-forward channels and heads, the same number less in every block.

    A channel or head is unread if only zero columns read it, whichever method pruned it. Its biases are removed too.
    Before the folder appears, the smaller blocks are run and compared with the original ones.

    Args:
        model: Hugging Face id or local folder: dense safetensors.
        out: folder to write; must not exist.
        trust_remote_code: run model code that comes with the checkpoint.
        progress: told (parts done, parts, name of the part).

    Raises:
        BesaError: the model cannot be read, some block has no unread channels or heads, the family's configuration
            cannot describe the smaller shapes, or `out` exists or cannot be written.
    """
    source = local(model, progress, trust_remote_code)
    if header(folder_of(source)) is not None:
        raise BesaError(f"{model} is packed: make it dense with `besa unpack` first.")
    decoder = DecoderOnDisk(source)
    decoder.check_writable()
    kept = _kept(decoder, str(model))
    config = _smaller_config(source, decoder, kept)
    blocks = len(decoder.blocks)

    def parts() -> Iterator[dict[str, Tensor]]:
        for name, tensor in decoder.tensors_outside_blocks():
            yield {name: tensor}
        for block in decoder.blocks:
            dense_couplings = couplings(block)  # of the widths before
            with decoder.opened(block, CPU):
                for coupling in dense_couplings:
                    if coupling.kind in kept:
                        take_out(block, coupling, kept[coupling.kind][block.index])
                yield decoder.stored(block)
            progress(block.index + 1, 2 * blocks, block.name)

    numbers = {coupling.kind: coupling.structures for coupling in couplings(decoder.blocks[0])}
    sizes = {kind: (numbers[kind], len(indices[0])) for kind, indices in kept.items()}
    earlier = config.get("besa", {}).get("shrunk", {})
    removed = earlier | {kind: (earlier.get(kind, sizes[kind])[0], sizes[kind][1]) for kind in sizes}
    config["besa"] = config.get("besa", {}) | {"shrunk": removed}
    before = size_of(folder_of(source).glob("*.safetensors"))
    with appearing(Path(out)) as folder:
        rewrite(source, folder, parts(), config, STEM)
        written = DecoderOnDisk(replace(source, name=str(out), location=str(folder)))
        _compare(DecoderOnDisk(source), written, progress)
        after = size_of(folder.glob("*.safetensors"))
    return Shrinking(structures=sizes, file_bytes_before=before, file_bytes=after)


def _kept(decoder: DecoderOnDisk, model: str) -> Kept:
    """Indices (K,) of the structures that stay, by kind and block: the same number in each block.

    Raises:
        BesaError: some block has no unread structures of any kind.
    """
    known = alike(decoder.blocks)
    unread: Kept = {coupling.kind: [] for coupling in known}
    for block in decoder.blocks:
        with decoder.opened(block, CPU):
            for coupling in couplings(block):
                unread[coupling.kind].append(coupling.unread({name: block.weight(name) for name in coupling.columns}))
    kept: Kept = {}
    for kind, by_block in unread.items():
        number = min(min(int(unread_S.sum()) for unread_S in by_block), len(by_block[0]) - 1)
        if number:
            kept[kind] = [_without_first(unread_S, number) for unread_S in by_block]
    if not kept:
        kinds = " or ".join(CALLED[coupling.kind] for coupling in known)
        raise BesaError(f"{model} has blocks without unread {kinds}: prune with allocation.method=structured first.")
    return kept


def _without_first(unread_S: Tensor, number: int) -> Tensor:
    """Indices (K,) of all structures but the first `number` unread ones."""
    stay_S = torch.ones_like(unread_S)
    stay_S[unread_S.nonzero().flatten()[:number]] = False
    return stay_S.nonzero().flatten()


def _smaller_config(source: Source, decoder: DecoderOnDisk, kept: Kept) -> dict[str, Any]:
    """The config.json of the smaller model.

    Raises:
        BesaError: a model made from it has other shapes than the tensors that will be written.
    """
    config = read_config_json(folder_of(source))
    like = read_config(source)
    for coupling in couplings(decoder.blocks[0]):
        if coupling.kind in kept:
            config |= coupling.settings(like, len(kept[coupling.kind][0]))
    smaller = type(like).from_dict(config)
    smaller.dtype = decoder.model.dtype
    with torch.device("meta"):
        written = skeleton(source, like)
        for block in find_blocks(written):
            for coupling in couplings(block):
                if coupling.kind in kept:
                    take_out(block, coupling, kept[coupling.kind][block.index].to("meta"))
        try:
            described = skeleton(source, smaller).state_dict()
        except BesaError:  # a family that checks its configuration
            described = {}
    if _shapes(described) != _shapes(written.state_dict()):
        raise BesaError(
            f"{source.name} is a {like.model_type} model, whose configuration cannot describe fewer "
            f"{' and '.join(CALLED[kind] for kind in kept)}."
        )
    return config


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


@torch.no_grad()
def _compare(before: DecoderOnDisk, after: DecoderOnDisk, progress: Progress) -> None:
    """Run the blocks of both models on the same hidden states, with one pair in memory at a time.

    Raises:
        BesaError: the outputs of a pair differ by more than rounding.
    """
    vocabulary = before.model.get_input_embeddings().weight.shape[0]
    tokens_NT = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with before.embeddings(CPU):
        (x_NTC,) = capture_inputs(before.model, before.blocks, tokens_NT, 1)
    with after.embeddings(CPU):
        list(capture_inputs(after.model, after.blocks, tokens_NT, 1))  # for the arguments of its blocks
    for block, smaller in zip(before.blocks, after.blocks, strict=True):
        with before.opened(block, CPU), after.opened(smaller, CPU):
            y_NTC, smaller_NTC = block(x_NTC), smaller(x_NTC)
        allowed = TOLERANCE * torch.finfo(y_NTC.dtype).eps * float(y_NTC.float().norm())
        if not float((smaller_NTC.float() - y_NTC.float()).norm()) <= allowed:
            raise BesaError(
                f"{block.name} computes something else with smaller matrices: the zeros of this model cannot be "
                "removed from it."
            )
        x_NTC = y_NTC
        progress(len(before.blocks) + block.index + 1, 2 * len(before.blocks), f"{block.name} compared")
