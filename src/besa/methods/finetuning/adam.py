"""Masked Adam: the kept weights of a block learn together, down the error of its output against the dense path's.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, O rows, I columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from besa.learning import Learning
from besa.methods.finetuning.finetuner import Finetuner
from besa.methods.finetuning.problem import Finetuned, FinetuningProblem
from besa.methods.reconstruction.written import written
from besa.methods.steps import average, one_pass, root_mean_square, split
from besa.models.blocks import Block
from besa.models.transfers import fetched
from besa.models.units import Unit
from besa.observing.input_statistics import HELD_OUT
from besa.observing.losses import reconstruction_error, token_weighted_error
from besa.system import ranks
from besa.system.machine import learning_dtype, loss_scaler, multiplying_in


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

    def with_epochs(self, epochs: int) -> Self:
        """The same settings with so many epochs."""
        return self.model_copy(update={"epochs": epochs})

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

    def tune(self, problem: FinetuningProblem) -> Finetuned:
        """The weights with the lowest loss on the held-out sequences."""
        block, names, share = problem.block, problem.names, problem.share
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
        generator = torch.Generator().manual_seed(problem.seed)
        own_held = share.own(held)
        losses = [self._mean_loss(problem, leaves, own_held)]
        best = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        for _ in range(self.epochs):
            for sequences in one_pass(learned, self.sequences, generator):
                scale = scaler.scale(torch.ones((), device=leaves[names[0]].device))  # every rank has one
                for place in share.own(sequences):
                    (self._loss(problem, leaves, place) * scale).backward()
                average(leaves.values(), len(sequences))
                for name, leaf in leaves.items():
                    if leaf.grad is not None:  # None if no token of this sequence reached an expert
                        leaf.grad.masked_fill_(pruned[name], 0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                schedule.step()
            losses.append(self._mean_loss(problem, leaves, own_held))
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

    def _mean_loss(self, problem: FinetuningProblem, weights: Mapping[str, Tensor], places: list[int]) -> float:
        """The mean loss of the sequences at these places of all ranks."""
        with torch.no_grad():
            losses = [self._loss(problem, weights, place) for place in places]
        values = ranks.all_of(torch.stack(losses).tolist() if losses else [])
        return fmean(loss for of_rank in values for loss in of_rank)

    def _loss(self, problem: FinetuningProblem, weights: Mapping[str, Tensor], place: int) -> Tensor:
        """The loss (scalar) of the block with these float32 weights, on one sequence."""
        block, name = problem.block, next(iter(weights))
        stored, dtype = block.weight(name), self._dtype(block, name)
        paths = (problem.inputs_NTC, problem.targets_NTC)
        x_NTC, target_NTC = (fetched(states_NTC[place : place + 1], stored.device) for states_NTC in paths)
        with multiplying_in(dtype, stored.dtype, stored.device):
            y_NTC = block(x_NTC, {name: w_OI.to(stored.dtype) for name, w_OI in weights.items()})
        if self.loss == "channel":
            return reconstruction_error(y_NTC, target_NTC)
        return token_weighted_error(y_NTC, target_NTC, self.token_power)
