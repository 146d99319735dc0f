"""What an allocation is given and what it returns: one block with its weights ranked, and zeros per row.

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
from besa.models.units import Unit
from besa.observing.losses import reconstruction_error
from besa.quantization import Clipping


@dataclass(frozen=True)
class RankedLinear:
    """A weight of the block with the order in which its entries go.

    Attributes:
        w_OI: the dense weight.
        importance_OI: float32, from the recipe's criterion.
        ranks_OI: place in the pruning order of its row, 0 = first.
        reached: whether calibration tokens reached it; no token reaches an expert that is never chosen.
        power: importance to this power is a squared error of the linear's output; None where it is no such error.
    """

    w_OI: Tensor
    importance_OI: Tensor
    ranks_OI: Tensor
    reached: bool = True
    power: int | None = 2

    @property
    def zeros_O(self) -> Tensor:
        """Weights of each row (O,) that are zero already, int64 on the CPU."""
        return (self.w_OI == 0).sum(dim=1).cpu()

    @property
    def errors_OI(self) -> Tensor:
        """The squared error of the linear's output that each weight's loss makes (O, I), float32."""
        assert self.power is not None, "a recipe refuses importances that are no errors where they are compared"
        return self.importance_OI.float().pow(self.power)

    def errors(self, gradients_O: Tensor) -> Tensor:
        """The squared error of the block's output that each weight's loss makes (O, I), float32.

        Args:
            gradients_O: squared gradients from there to the rows, as from `probes.RowSensitivities`.
        """
        return self.errors_OI * gradients_O[:, None]


@dataclass(frozen=True)
class BlockProblem:
    """Which weights of a block to prune, so that its linears end with the zeros of their budgets, exactly.

    Attributes:
        block: the block, or what else is pruned at once; runs with any weights.
        linears: ranked weights by full name.
        inputs_NTC: hidden states that reach the block on the pruned path.
        targets_NTC: block outputs to stay close to (the teacher's), for so many tokens from the beginning of each
            sequence as the allocation asks for at least.
        budgets: each linear stands in one of them.
        seed: of whatever the allocation draws.
        clippings: of the weights that are quantised while the rates are learned, by full name.
        own_outputs: the loss is on each linear's own output, for the inputs it has in the dense block.
    """

    block: Block | Unit
    linears: dict[str, RankedLinear]
    inputs_NTC: HiddenStates
    targets_NTC: HiddenStates
    budgets: list[Budget]
    seed: int
    clippings: Mapping[str, Clipping] = field(default_factory=dict)
    own_outputs: bool = False

    @property
    def device(self) -> torch.device:
        """Where the block is; the hidden states may live elsewhere."""
        return next(iter(self.linears.values())).w_OI.device

    @property
    def dtype(self) -> torch.dtype:
        """In which the block is."""
        return next(iter(self.linears.values())).w_OI.dtype

    def error(self, chosen_N: Tensor, tokens: int, weights: Mapping[str, Tensor], plain: float = 0.0) -> Tensor:
        """The first term of eq. 1 (scalar, float32).

        Args:
            chosen_N: which sequences.
            tokens: of each, from its beginning.
            weights: matrices by full name that are not the block's own; gradients reach them.
            plain: as in `reconstruction_error`; errors of linears by themselves have no such part.
        """
        x_NTC = self.inputs_NTC[chosen_N][:, :tokens].to(self.device)
        if self.own_outputs:
            return errors_of_linears(self.block, x_NTC, weights)
        targets_NTC = self.targets_NTC[chosen_N][:, :tokens].to(self.device)
        return reconstruction_error(self.block(x_NTC, weights), targets_NTC, plain)


@dataclass(frozen=True)
class Allocated:
    """What is to be zero.

    Attributes:
        counts: zeros of each row of each linear, int64 on the CPU.
        losses: at every learning step, if any.
        ranks: places in the pruning order of a row, for linears in which it is not that of the problem.
    """

    counts: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)
    ranks: dict[str, Tensor] = field(default_factory=dict)


def first_tokens(seqlen: int, share: float) -> int:
    """How many tokens a share of a sequence is."""
    return max(1, round(share * seqlen))
