"""Couplings: which rows of some linears of a block and which columns of another can only go together.

A *unit* is a channel of the feed-forward, or a key-value head with the query heads that listen to it. Where the
columns that read a unit are zero, nothing else of it matters, biases included.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, O rows, I columns, U units.
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

# Names of linears that stand side by side in families; the last one reads what the others put out.
FEED_FORWARDS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("fc_in", "fc_out"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
ATTENTIONS = tuple(("q_proj", "k_proj", "v_proj", out) for out in ("o_proj", "out_proj", "dense"))
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")  # how configurations call it


@dataclass(frozen=True)
class Coupling:
    """Units of a block, each of as many consecutive rows and columns as every other.

    Attributes:
        kind: what the units are.
        units: how many there are.
        rows: of each linear that makes the units, by full name, how many rows a unit has.
        columns: of the linear that reads them, how many columns a unit has.
        weights: of one unit.
    """

    kind: Kind
    units: int
    rows: dict[str, int]
    columns: dict[str, int]
    weights: int

    @property
    def names(self) -> list[str]:
        """Full names of all its linears."""
        return [*self.rows, *self.columns]

    def without(self, weights: Mapping[str, Tensor], gone_U: Tensor) -> dict[str, Tensor]:
        """Its weights (O, I) with the units that go set to zero, in rows and columns."""
        by_row = {name: gone_U.repeat_interleave(size)[:, None] for name, size in self.rows.items()}
        by_column = {name: gone_U.repeat_interleave(size) for name, size in self.columns.items()}
        return {name: weights[name].masked_fill(gone, 0) for name, gone in (by_row | by_column).items()}

    def unread(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Which units (U,) meet only zero columns, and so could go: boolean, on the CPU."""
        ((name, size),) = self.columns.items()
        return (weights[name] == 0).reshape(-1, self.units, size).all(dim=2).all(dim=0).cpu()

    def settings(self, config: PreTrainedConfig, units: int) -> dict[str, int]:
        """What a configuration says of a model of which every block has so many units."""
        if self.kind == "ffn":
            return {key: units for key in WIDTHS if hasattr(config, key)}
        size, queries = min(self.rows.values()), max(self.rows.values())
        heads = {"num_attention_heads": units * queries // size, "head_dim": size}
        return heads | ({"num_key_value_heads": units} if hasattr(config, "num_key_value_heads") else {})


def couplings(block: Block) -> list[Coupling]:
    """The couplings that a block's modules tell: heads first, then the feed-forward; what cannot be told is left out.

    Fused query-key-value or gate-up matrices and mixtures of experts tell none.
    """
    if any(prunable.expert is not None for prunable in block.prunables.values()):
        return []
    attention, feed_forward = _beside(block, ATTENTIONS), _beside(block, FEED_FORWARDS)
    found = [_heads(block, attention[0]) if len(attention) == 1 else None]
    found.append(_channels(block, feed_forward[0]) if len(feed_forward) == 1 else None)
    return [coupling for coupling in found if coupling is not None]


def _beside(block: Block, patterns: tuple[tuple[str, ...], ...]) -> list[list[str]]:
    """Full names of the linears of a pattern, for each module that has them; the first pattern that fits counts."""
    inside: dict[str, set[str]] = {}
    for name in block.prunables:
        parent, _, last = name.rpartition(".")
        inside.setdefault(parent, set()).add(last)
    fitting = {parent: [own for own in patterns if own_names.issuperset(own)] for parent, own_names in inside.items()}
    return [[f"{parent}.{last}" for last in found[0]] for parent, found in fitting.items() if found]


def _channels(block: Block, names: list[str]) -> Coupling | None:
    *makers, reader = names
    units = block.prunables[reader].columns
    if any(block.prunables[name].rows != units for name in makers):
        return None
    return _coupling(block, "ffn", units, makers, reader)


def _heads(block: Block, names: list[str]) -> Coupling | None:
    query, key, value, reader = (block.prunables[name] for name in names)
    parent = block.module.get_submodule(names[0].removeprefix(f"{block.name}.").rpartition(".")[0])
    size = getattr(parent, "head_dim", None)
    if not isinstance(size, int) or key.rows % size or key.rows != value.rows:
        return None
    if query.rows % key.rows or query.rows != reader.columns:
        return None
    return _coupling(block, "heads", key.rows // size, names[:3], names[3])


def _coupling(block: Block, kind: Kind, units: int, makers: list[str], reader: str) -> Coupling:
    rows = {name: block.prunables[name].rows // units for name in makers}
    columns = {reader: block.prunables[reader].columns // units}
    weights = sum(block.prunables[name].numel for name in [*makers, reader]) // units
    return Coupling(kind, units, rows, columns, weights)


@torch.no_grad()
def check(block: Block, coupling: Coupling, gone_U: Tensor, x_NTC: Tensor) -> None:
    """See on the block itself that what makes a unit does not matter where its columns are zero.

    Args:
        block: dense, with the arguments of a call for hidden states of this shape.
        coupling: of the block.
        gone_U: units to try it on.
        x_NTC: hidden states on the block's device.

    Raises:
        BesaError: it does, as where a norm is taken over all heads.
    """
    own = {name: block.weight(name) for name in coupling.names}
    zeroed = coupling.without(own, gone_U)
    unread = {name: zeroed[name] if name in coupling.columns else own[name].clone() for name in own}
    if not torch.equal(block(x_NTC, unread), block(x_NTC, zeroed)):
        raise BesaError(
            f"The {CALLED[coupling.kind]} of {block.name} are not independent of each other: they cannot be taken out "
            "one by one; choose another allocation."
        )


def take_out(block: Block, coupling: Coupling, kept_K: Tensor) -> None:
    """Make the coupled linears of a block smaller, in place: of their units the `kept_K` (indices) stay."""
    for name, size in coupling.rows.items():
        _keep(block, name, _places(kept_K, size), rows=True)
    for name, size in coupling.columns.items():
        _keep(block, name, _places(kept_K, size), rows=False)


def _places(kept_K: Tensor, size: int) -> Tensor:
    return (kept_K[:, None] * size + torch.arange(size, device=kept_K.device)).flatten()


def _keep(block: Block, name: str, places: Tensor, rows: bool) -> None:
    module: Any = block.module.get_submodule(name.removeprefix(f"{block.name}."))
    axis = int(block.prunables[name].transposed == rows)  # 0: first axis, where `nn.Linear` has its rows
    module.weight = nn.Parameter(module.weight.index_select(axis, places), requires_grad=False)
    if rows and module.bias is not None:
        module.bias = nn.Parameter(module.bias.index_select(0, places), requires_grad=False)


def alike(blocks: Collection[Block]) -> list[Coupling]:
    """The couplings of the first block, with which those of all others agree in kind, units and sizes.

    Raises:
        BesaError: they do not, or there are none.
    """
    shapes = {tuple((own.kind, own.units, own.weights) for own in couplings(block)) for block in blocks}
    first = next(iter(blocks))
    if shapes == {()}:
        raise BesaError(
            f"{type(first.module).__name__} has no feed-forward or heads that can be told apart: matrices that are "
            "fused, mixtures of experts and unknown names are not taken apart."
        )
    if len(shapes) > 1:
        raise BesaError("The blocks of this model are of different shapes: no configuration could say fewer channels.")
    return couplings(first)
