"""Fine-tuning: the kept weights of a block change together to bring its output closer to that of the dense path.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, O rows, I columns.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from besa.learning import Learning
from besa.methods.reconstruction.written import written
from besa.methods.steps import average, one_pass, root_mean_square, split
from besa.models.activations import HiddenStates
from besa.models.blocks import Block
from besa.models.transfers import fetched
from besa.models.units import Unit
from besa.observing.input_statistics import HELD_OUT
from besa.observing.losses import reconstruction_error, token_weighted_error
from besa.settings import Settings
from besa.system import ranks
from besa.system.machine import learning_dtype, loss_scaler, multiplying_in
from besa.system.ranks import Share


@dataclass(frozen=True)
class Finetuned:
    """The result of fine-tuning.

    Attributes:
        weights: (O, I) by full name, in the dtype of the model.
        losses: on held-out sequences, before the first epoch and after every epoch.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)


class Finetuner(Settings):
    """Base of all ways to fine-tune. The defaults describe one that does nothing.

    Attributes:
        moves_weights: whether kept weights change; the dense path then needs the outputs of all tokens.
    """

    moves_weights: ClassVar[bool] = False

    @property
    def epoch_passes(self) -> float:
        """Forward passes over the calibration set in an epoch; a backward pass counts as two."""
        return 0.0

    @property
    def passes(self) -> float:
        """Forward passes over the calibration set in all epochs, at most."""
        return 0.0

    @property
    def learned_passes(self) -> float:
        """The part of `passes` that learning steps take."""
        return 0.0

    @property
    def sequences(self) -> int:
        """Sequences of a learning step."""
        return 1

    def summed_bytes(self, shapes: Sequence[tuple[int, int]], samples: int) -> int:
        """Bytes that ranks add up in all learning steps, at most.

        Args:
            shapes: rows and columns of each linear.
            samples: calibration sequences of all ranks.
        """
        return 0

    def bytes_per_weight(self, item: int) -> int:
        """Bytes that fine-tuning keeps for each weight, besides the weight itself.

        Args:
            item: bytes of a weight of the model.
        """
        return 0

    @abstractmethod
    def tune(
        self,
        block: Block | Unit,
        names: list[str],
        inputs_NTC: HiddenStates,
        targets_NTC: HiddenStates,
        share: Share,
        seed: int,
    ) -> Finetuned:
        """Fine-tune a pruned block. The block itself is not changed.

        Args:
            block: with its pruned weights.
            names: full names of the matrices that may change.
            inputs_NTC: inputs on the pruned path.
            targets_NTC: outputs of the dense path, for the same tokens.
            share: the sequences of inputs and targets, which are those of this rank.
            seed: of the order of sequences.
        """


class NoFinetuning(Finetuner):
    """Weights stay as the reconstruction left them; `finetune.method=none`."""

    method: Literal["none"] = "none"

    def tune(
        self,
        block: Block | Unit,
        names: list[str],
        inputs_NTC: HiddenStates,
        targets_NTC: HiddenStates,
        share: Share,
        seed: int,
    ) -> Finetuned:
        """Change nothing: return no weights and no losses."""
        return Finetuned()


class MaskedAdam(Learning, Finetuner):
    """Adam on the weights that are not zero, with a step size that falls linearly to zero.

    The loss on held-out sequences is measured after every epoch. The best weights are kept. The first epoch that does
    not lower the loss is the last.
    """

    method: Literal["adam"] = "adam"
    epochs: int = Field(default=2, ge=1, description="passes over the calibration set, at most")
    rate: float = Field(
        default=1e-3,
        gt=0,
        description="first step size, as a share of a matrix's root mean square; times √batch, for fewer steps",
    )
    loss: Literal["channel", "token"] = Field(
        default="token",
        description="squared error relative to each channel's norm, or weighted by a power of each token's norm",
    )
    token_power: float = Field(
        default=1.0, ge=0, le=2, description="tokens weigh 1 / norm to this power: 0 is the plain squared error"
    )
    autocast: bool = Field(
        default=True, description="multiply in bfloat16 while learning, if that makes a float32 run faster"
    )
    moves_weights: ClassVar[bool] = True
    most_shared: ClassVar[int] = 4

    @property
    def epoch_passes(self) -> float:
        """Forward and backward over the sequences learned from, and forward over those held out."""
        held = 1 / HELD_OUT
        return 3 * (1 - held) + held

    @property
    def passes(self) -> float:
        """All epochs, and a forward pass over the held-out sequences before the first."""
        return self.epochs * self.epoch_passes + 1 / HELD_OUT

    @property
    def learned_passes(self) -> float:
        """Forward and backward over the sequences learned from, in all epochs."""
        return self.epochs * 3 * (1 - 1 / HELD_OUT)

    def summed_bytes(self, shapes: Sequence[tuple[int, int]], samples: int) -> int:
        """Float32 gradients of all weights, and for each linear whether any token of the step reached it."""
        weights = sum(rows * columns for rows, columns in shapes)
        return self._steps(samples) * (4 * weights + 8 * len(shapes))

    def _steps(self, samples: int) -> int:
        """The number of learning steps in all epochs."""
        _, learned = split(samples)
        return self.epochs * -(-len(learned) // self.sequences)

    def bytes_per_weight(self, item: int) -> int:
        """Weight, gradient, two moments and the best weight so far in float32, the mask, and copies to multiply."""
        return 21 + item + 2

    def tune(
        self,
        block: Block | Unit,
        names: list[str],
        inputs_NTC: HiddenStates,
        targets_NTC: HiddenStates,
        share: Share,
        seed: int,
    ) -> Finetuned:
        """The weights with the lowest loss on the held-out sequences."""
        if not names:
            return Finetuned()
        before = {name: block.weight(name).detach() for name in names}
        leaves = {name: w_OI.float().clone().requires_grad_() for name, w_OI in before.items()}
        pruned = {name: w_OI == 0 for name, w_OI in before.items()}
        held, learned = split(share.total)
        sizes: list[float] = torch.stack([root_mean_square(leaf) for leaf in leaves.values()]).tolist()
        rate = self.rate * math.sqrt(self.sequences)
        groups = [{"params": [leaf], "lr": rate * size} for leaf, size in zip(leaves.values(), sizes, strict=True)]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self._steps(share.total))
        scaler = loss_scaler(self._dtype(block, names[0]), leaves[names[0]].device)
        generator = torch.Generator().manual_seed(seed)
        own_held = share.own(held)
        losses = [self._mean_loss(block, leaves, inputs_NTC, targets_NTC, own_held)]
        best = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        for _ in range(self.epochs):
            for sequences in one_pass(learned, self.sequences, generator):
                scale = scaler.scale(torch.ones((), device=leaves[names[0]].device))  # every rank has one
                for place in share.own(sequences):
                    (self._loss(block, leaves, inputs_NTC, targets_NTC, place) * scale).backward()
                average(leaves.values(), len(sequences))
                for name, leaf in leaves.items():
                    if leaf.grad is not None:  # None if no token of this sequence reached an expert
                        leaf.grad.masked_fill_(pruned[name], 0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                schedule.step()
            losses.append(self._mean_loss(block, leaves, inputs_NTC, targets_NTC, own_held))
            if not losses[-1] < min(losses[:-1]):
                break
            for name, leaf in leaves.items():
                best[name].copy_(leaf.detach())
        weights = {name: written(w_OI, ~pruned[name], before[name].dtype) for name, w_OI in best.items()}
        return Finetuned(weights, losses)

    def _dtype(self, block: Block | Unit, name: str) -> torch.dtype:
        """The dtype in which the block multiplies while it learns."""
        stored = block.weight(name)
        return learning_dtype(stored.dtype, stored.device) if self.autocast else stored.dtype

    def _mean_loss(
        self,
        block: Block | Unit,
        weights: Mapping[str, Tensor],
        inputs_NTC: HiddenStates,
        targets_NTC: HiddenStates,
        places: list[int],
    ) -> float:
        """The mean loss of the sequences at these places of all ranks."""
        with torch.no_grad():
            losses = [self._loss(block, weights, inputs_NTC, targets_NTC, place) for place in places]
        values = ranks.all_of(torch.stack(losses).tolist() if losses else [])
        return fmean(loss for of_rank in values for loss in of_rank)

    def _loss(
        self,
        block: Block | Unit,
        weights: Mapping[str, Tensor],
        inputs_NTC: HiddenStates,
        targets_NTC: HiddenStates,
        place: int,
    ) -> Tensor:
        """The loss (scalar) of the block with these float32 weights, on one sequence."""
        name = next(iter(weights))
        stored, dtype = block.weight(name), self._dtype(block, name)
        x_NTC, target_NTC = (fetched(states[place : place + 1], stored.device) for states in (inputs_NTC, targets_NTC))
        with multiplying_in(dtype, stored.dtype, stored.device):
            y_NTC = block(x_NTC, {name: w_OI.to(stored.dtype) for name, w_OI in weights.items()})
        if self.loss == "channel":
            return reconstruction_error(y_NTC, target_NTC)
        return token_weighted_error(y_NTC, target_NTC, self.token_power)


Finetuning = Annotated[NoFinetuning | MaskedAdam, Field(discriminator="method")]
