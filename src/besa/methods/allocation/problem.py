"""The input and output of an allocation: a block with ranked weights, and zeros per row.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from besa.counting.budget import Budget
from besa.methods.allocation.outputs import errors_of_linears
from besa.models.activations import HiddenStates
from besa.models.blocks import Block
from besa.models.transfers import fetched
from besa.models.units import Unit
from besa.observing.losses import reconstruction_error
from besa.quantization import Clipping
from besa.system.ranks import Share


@dataclass(frozen=True)
class RankedLinear:
    """A weight of the block with its pruning order.

    Attributes:
        w_OI: the dense weight.
        importance_OI: float32, from the recipe's criterion.
        ranks_OI: place of each weight in the pruning order of its row, 0 = first.
        reached: whether calibration tokens reached it; no token reaches an expert that is never chosen.
        power: importance to this power is the squared error of the linear's output; None if importance is no error.
    """

    w_OI: Tensor
    importance_OI: Tensor
    ranks_OI: Tensor
    reached: bool = True
    power: int | None = 2

    @property
    def zeros_O(self) -> Tensor:
        """Weights of each row (O,) that are zero already, int64."""
        return (self.w_OI == 0).sum(dim=1)

    @property
    def errors_OI(self) -> Tensor:
        """The squared error of the linear's output if one weight is removed (O, I), float32."""
        assert self.power is not None, "recipes refuse to compare importances that are no errors"
        return self.importance_OI.float().pow(self.power)

    def errors(self, gradients_O: Tensor) -> Tensor:
        """What the removal of one weight adds to the model's loss (O, I), float32, up to a common factor.

        Args:
            gradients_O: squared gradients of the loss at the rows (`fisher.LossGradients`).
        """
        return self.errors_OI * gradients_O[:, None]


@dataclass(frozen=True)
class BlockProblem:
    """A block to prune, so that its linears end with exactly the zeros of their budgets.

    Attributes:
        block: the block or unit; it can run with any weights.
        linears: ranked weights by full name.
        inputs_NTC: inputs of the block on the pruned path.
        targets_NTC: outputs of the teacher, for at least as many tokens from the beginning of each sequence as the
            allocation uses.
        budgets: each linear belongs to one of them.
        seed: of random choices.
        share: the sequences of the inputs and targets, which are those of this rank.
        clippings: of the weights that are quantised while the rates are learned, by full name.
        gradients: squared gradients of the model's loss at the rows (O,), float32, by full name of the matrix; empty if
            the allocation needs none.
        own_outputs: whether the loss compares each linear's own output, for its inputs in the dense block.
    """

    block: Block | Unit
    linears: dict[str, RankedLinear]
    inputs_NTC: HiddenStates
    targets_NTC: HiddenStates
    budgets: list[Budget]
    seed: int
    share: Share
    clippings: Mapping[str, Clipping] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    own_outputs: bool = False

    @property
    def device(self) -> torch.device:
        """The device of the block; the hidden states may be elsewhere."""
        return next(iter(self.linears.values())).w_OI.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the block."""
        return next(iter(self.linears.values())).w_OI.dtype

    def gradients_O(self, name: str) -> Tensor:
        """Squared gradients of the model's loss at the rows of a matrix (O,), float32, on the device."""
        return self.gradients[name].to(self.device)

    def error(self, chosen: int, tokens: int, weights: Mapping[str, Tensor], plain: float = 0.0) -> Tensor:
        """The first term of eq. 1 (scalar, float32).

        Args:
            chosen: position of the sequence in the share.
            tokens: how many tokens of it, from its beginning.
            weights: matrices (O, I) by full name that replace the block's; gradients reach them.
            plain: as in `reconstruction_error`.
        """
        one = slice(chosen, chosen + 1)
        x_NTC = fetched(self.inputs_NTC[one][:, :tokens], self.device)
        if self.own_outputs:
            return errors_of_linears(self.block, x_NTC, weights, plain)
        targets_NTC = fetched(self.targets_NTC[one][:, :tokens], self.device)
        return reconstruction_error(self.block(x_NTC, weights), targets_NTC, plain)


@dataclass(frozen=True)
class Allocated:
    """The result of an allocation: how many weights of each row become zero.

    Attributes:
        counts: zeros of each row (O,) by full name, int64, on the device of the weight.
        losses: at every learning step, if any.
        ranks: ranks (O, I) by full name, for linears whose pruning order differs from that of the problem.
        biases: full names of parameters beside the linears that become zero too.
    """

    counts: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)
    ranks: dict[str, Tensor] = field(default_factory=dict)
    biases: tuple[str, ...] = ()


def first_tokens(seqlen: int, share: float) -> int:
    """The number of tokens in a share of a sequence, at least one."""
    return max(1, round(share * seqlen))
