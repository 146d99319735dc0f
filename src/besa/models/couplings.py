"""Couplings: rows of some linears of a block and columns of another that can only be removed together.

A *structure* is a channel of the feed-forward, or a key-value head with its query heads. Some linears write it with
their rows, and one linear reads it with its columns. A structure has no effect where the columns that read it are zero,
so its rows and biases can then be removed too.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, O rows, I columns, S structures.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from besa.errors import BesaError
from besa.models.blocks import Block

Kind = Literal["ffn", "heads"]
CALLED = {"ffn": "feed-forward channels", "heads": "key-value heads"}

# Names of the linears of one module, by family; the last linear reads the output of the others.
FEED_FORWARDS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("fc_in", "fc_out"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
ATTENTIONS = tuple(("q_proj", "k_proj", "v_proj", out) for out in ("o_proj", "out_proj", "dense"))
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")  # the feed-forward's width in configurations

HEADS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads")  # of modules


@dataclass(frozen=True)
class Coupling:
    """Structures of a block, all of the same number of consecutive rows and columns.

    Attributes:
        kind: of the structures.
        structures: number of structures.
        rows: rows of one structure in each linear that writes it, by the linear's full name.
        columns: columns of one structure in the linear that reads it, by the linear's full name.
        weights: number of weights of one structure.
    """

    kind: Kind
    structures: int
    rows: dict[str, int]
    columns: dict[str, int]
    weights: int

    @property
    def names(self) -> list[str]:
        """Full names of the coupled linears."""
        return [*self.rows, *self.columns]

    def without(self, weights: Mapping[str, Tensor], gone_S: Tensor) -> dict[str, Tensor]:
        """The weights (O, I) with zeros in the rows and columns of the structures `gone_S`."""
        by_row = {name: gone_S.repeat_interleave(size)[:, None] for name, size in self.rows.items()}
        by_column = {name: gone_S.repeat_interleave(size) for name, size in self.columns.items()}
        return {name: weights[name].masked_fill(gone, 0) for name, gone in (by_row | by_column).items()}

    def unread(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Structures (S,) that are read by zero columns only and could be removed: boolean, on the CPU."""
        ((name, size),) = self.columns.items()
        return (weights[name] == 0).reshape(-1, self.structures, size).all(dim=2).all(dim=0).cpu()

    def settings(self, config: PreTrainedConfig, structures: int) -> dict[str, int]:
        """The keys of a configuration, for a model with this number of structures in every block."""
        if self.kind == "ffn":
            return {key: structures for key in WIDTHS if hasattr(config, key)}
        size, queries = min(self.rows.values()), max(self.rows.values())
        heads = {"num_attention_heads": structures * queries // size, "head_dim": size}
        return heads | ({"num_key_value_heads": structures} if hasattr(config, "num_key_value_heads") else {})


def couplings(block: Block) -> list[Coupling]:
    """The couplings that a block's module names and widths show: heads first, then the feed-forward.

    Blocks with fused query-key-value or gate-up matrices, and with mixtures of experts, show none.
    """
    if any(prunable.expert is not None for prunable in block.prunables.values()):
        return []
    attention, feed_forward = _beside(block, ATTENTIONS), _beside(block, FEED_FORWARDS)
    heads = _heads(block, attention[0]) if len(attention) == 1 else None
    channels = _channels(block, feed_forward[0]) if len(feed_forward) == 1 else None
    return [coupling for coupling in (heads, channels) if coupling is not None]


def _beside(block: Block, patterns: tuple[tuple[str, ...], ...]) -> list[list[str]]:
    """Full names of the linears of the first pattern that fits a module, for each module that one fits."""
    children: dict[str, set[str]] = {}
    for name in block.prunables:
        parent, _, last = name.rpartition(".")
        children.setdefault(parent, set()).add(last)
    fitting = {parent: [each for each in patterns if names.issuperset(each)] for parent, names in children.items()}
    return [[f"{parent}.{last}" for last in matches[0]] for parent, matches in fitting.items() if matches]


def _channels(block: Block, names: list[str]) -> Coupling | None:
    *writers, reader = names
    structures = block.prunables[reader].columns
    if any(block.prunables[name].rows != structures for name in writers):
        return None
    return _coupling(block, "ffn", structures, writers, reader)


def _heads(block: Block, names: list[str]) -> Coupling | None:
    query, key, value, reader = (block.prunables[name] for name in names)
    parent = block.module.get_submodule(names[0].removeprefix(f"{block.name}.").rpartition(".")[0])
    size = getattr(parent, "head_dim", None)
    if not isinstance(size, int) or key.rows % size or key.rows != value.rows:
        return None
    if query.rows % key.rows or query.rows != reader.columns:
        return None
    return _coupling(block, "heads", key.rows // size, names[:3], names[3])


def _coupling(block: Block, kind: Kind, structures: int, writers: list[str], reader: str) -> Coupling:
    rows = {name: block.prunables[name].rows // structures for name in writers}
    columns = {reader: block.prunables[reader].columns // structures}
    weights = sum(block.prunables[name].numel for name in [*writers, reader]) // structures
    return Coupling(kind, structures, rows, columns, weights)


@torch.no_grad()
def check(block: Block, coupling: Coupling, gone_S: Tensor, x_NTC: Tensor) -> None:
    """Run the block to verify that the rows of a structure have no effect where its columns are zero.

    Args:
        block: dense, with the arguments of a call for hidden states of this shape.
        coupling: of the block.
        gone_S: structures that are set to zero for the test.
        x_NTC: hidden states on the block's device.

    Raises:
        BesaError: the rows have an effect, as where a norm is taken over all heads.
    """
    dense = {name: block.weight(name) for name in coupling.names}
    zeroed = coupling.without(dense, gone_S)
    unread = {name: zeroed[name] if name in coupling.columns else dense[name].clone() for name in dense}
    if not torch.equal(block(x_NTC, unread), block(x_NTC, zeroed)):
        raise BesaError(
            f"The {CALLED[coupling.kind]} of {block.name} depend on each other and cannot be removed one by one: "
            "choose another allocation."
        )


def take_out(block: Block, coupling: Coupling, kept_K: Tensor) -> None:
    """Make the coupled linears of a block smaller, in place: only the structures `kept_K` (indices) stay."""
    for name, size in coupling.rows.items():
        _keep(block, name, _places(kept_K, size), rows=True)
    for name, size in coupling.columns.items():
        _keep(block, name, _places(kept_K, size), rows=False)
    if coupling.kind == "heads":
        _count_heads(block, coupling, len(kept_K))


def _count_heads(block: Block, coupling: Coupling, kept: int) -> None:
    """Correct the numbers of heads that some families keep in their attention."""
    attention = block.module.get_submodule(next(iter(coupling.rows)).removeprefix(f"{block.name}.").rpartition(".")[0])
    queries = max(coupling.rows.values()) // min(coupling.rows.values())
    numbers = {coupling.structures: kept, coupling.structures * queries: kept * queries}
    for attribute in HEADS:
        if getattr(attention, attribute, None) in numbers:
            setattr(attention, attribute, numbers[getattr(attention, attribute)])


def _places(kept_K: Tensor, size: int) -> Tensor:
    return (kept_K[:, None] * size + torch.arange(size, device=kept_K.device)).flatten()


def _keep(block: Block, name: str, places: Tensor, rows: bool) -> None:
    module: Any = block.module.get_submodule(name.removeprefix(f"{block.name}."))
    axis = int(block.prunables[name].transposed == rows)  # 0: first axis, where `nn.Linear` has its rows
    module.weight = nn.Parameter(module.weight.index_select(axis, places), requires_grad=False)
    for attribute in ("out_features", "nf") if rows else ("in_features", "nx"):
        if hasattr(module, attribute):
            setattr(module, attribute, len(places))
    if rows and module.bias is not None:
        module.bias = nn.Parameter(module.bias.index_select(0, places), requires_grad=False)


def alike(blocks: Collection[Block]) -> list[Coupling]:
    """The couplings of the first block, after a check that all blocks have the same kinds, numbers and sizes.

    Raises:
        BesaError: the blocks differ, or have no couplings.
    """
    shapes = {tuple((each.kind, each.structures, each.weights) for each in couplings(block)) for block in blocks}
    first = next(iter(blocks))
    if shapes == {()}:
        raise BesaError(
            f"{type(first.module).__name__} has no feed-forward channels or heads that besa can separate: its matrices "
            "are fused, have unknown names, or belong to experts, of which `besa prune` writes those that stay."
        )
    if len(shapes) > 1:
        raise BesaError(
            "The blocks of this model have different shapes, so no configuration can describe fewer channels."
        )
    return couplings(first)
