"""Gradient descent on the output error of a block, for pruning rates, the clipping of a quantiser, or both.

Shape suffixes: N sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, PlainValidator
from torch import Tensor

from besa.learning import Learning
from besa.methods.allocation.changing import ChangingLinears
from besa.methods.allocation.problem import BlockProblem, first_tokens
from besa.methods.steps import Mean, one_pass
from besa.system.machine import learning_dtype, loss_scaler, multiplying_in

LOOK_EVERY = 16  # steps, at least, between two looks at the losses
# Gradients that Adam sees are around 1, whatever the model: some of them are far smaller, and it must not damp those.
EPS = 1e-16
SMALLEST = 1e-30  # a loss, to divide by
HALF = 0.5  # of a sequence
# Where steps would take each half sequence more often than so many times, whole ones serve better (docs/log.md).
REPEATS = 4


def _crop(value: Any) -> float | str:
    if value == "auto":
        return "auto"
    with suppress(TypeError, ValueError):
        if 0 < (share := float(value)) <= 1 and not isinstance(value, bool):
            return share
    raise ValueError(f"crop is {value!r:.80} but must be a share of a sequence, above 0 and up to 1, or auto")


class Descent(Learning):
    """Adam with a step size that falls linearly to zero, on the mean gradient of a few sequences per step.

    The sequences of a step are spread evenly over the calibration set. Ranks therefore share them, and compute together
    what one rank computes by itself.
    """

    crop: Annotated[float | Literal["auto"], PlainValidator(_crop)] = Field(
        default=HALF,
        description="share of a sequence, from its beginning, that a step uses; auto: half, or, where each would be "
        "taken more than four times, all of it in half as many steps of the same size",
    )
    steps: int = Field(default=64, ge=1, description="learning steps; those beyond a pass repeat the calibration set")
    tolerance: float = Field(
        default=0.01,
        ge=0,
        description="stop after a pass over the calibration set that lowers the loss by a smaller share; 0: never",
    )
    autocast: bool = Field(
        default=True, description="multiply in bfloat16 while learning, if that makes a float32 run faster"
    )
    travel: float = Field(
        default=12.0, gt=0, description="sum of Adam's step sizes, in logits; the step size falls linearly to zero"
    )
    plain: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the plain squared error in the loss; massive activations dominate it; 0.5 serves 70 %",
    )
    penalty: float = Field(
        default=100.0, ge=0, description="weight λ of the sparsity term of eq. 1, as a multiple of the loss at the step"
    )

    def tokens(self, seqlen: int) -> int:
        """Tokens of a sequence that a step uses, from its beginning; half of them until `settled` has chosen."""
        return first_tokens(seqlen, HALF if self.crop == "auto" else self.crop)

    def settled(self, ranks: int, samples: int, begun: Mapping[str, Any]) -> Self:
        """A copy of the settings in which the number of sequences and the crop are chosen.

        Whole sequences in half as many steps, and half of the travel, are as many tokens in steps of the same size.
        Arguments as of `Learning.settled`.
        """
        settled = super().settled(ranks, samples, begun)
        if self.crop != "auto":
            return settled
        if settled.sequences * self.steps <= REPEATS * samples:
            return settled.model_copy(update={"crop": HALF})
        return settled.model_copy(update={"crop": 1.0, "steps": -(-self.steps // 2), "travel": self.travel / 2})

    def descend(
        self, problem: BlockProblem, parts: Sequence[ChangingLinears], constant: dict[str, Tensor]
    ) -> list[float]:
        """Minimise eq. 1; returns the reconstruction loss at every step.

        Args:
            problem: the block.
            parts: the linears that learn.
            constant: weights (O, I) by full name that replace others of the block and do not learn.
        """
        parameters = [parameter for part in parts for parameter in part.parameters]
        count = sum(parameter.numel() for parameter in parameters)
        optimizer = torch.optim.Adam(parameters, lr=2 * self.travel / self.steps, eps=EPS, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self.steps)
        weights = constant | {name: leaf for part in parts for name, leaf in part.weights.items()}
        tokens = self.tokens(problem.inputs_NTC[:1].shape[1])
        dtype = self.dtype(problem)
        scaler = loss_scaler(dtype, problem.device, tokens * problem.inputs_NTC.shape[-1])
        weight = torch.full((), self.penalty * count, device=problem.device)
        losses: list[Tensor] = []
        in_pass = -(-problem.share.total // self.sequences)
        for sequences in self._steps(problem.share.total, problem.seed):
            for part in parts:
                part.update()
            loss, mean = torch.zeros((), device=problem.device), Mean(len(sequences))
            for chosen in problem.share.own(sequences):
                with multiplying_in(dtype, problem.dtype, problem.device):
                    error = problem.error(chosen, tokens, weights, self.plain)
                scaler.scale(error).backward()
                for part in parts:
                    part.finish_pass()
                loss.copy_(error.detach())
                mean.add([loss, *(gradient for part in parts for gradient in part.gradients)])
            mean.into([loss, *(gradient for part in parts for gradient in part.gradients)])
            losses.append(loss)
            # The gradient of the loss's logarithm, by parameters: neither a small loss nor a wide block makes it small.
            factor = count / loss.clamp_min(SMALLEST)
            for part in parts:
                part.backward(factor, scaler.scale(weight))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            schedule.step()
            if self._converged(losses, in_pass):
                break
        return _fetched(losses)

    def steps_bytes(self, gradients: int) -> int:
        """Bytes that ranks add up in all steps, at most: in each, the loss and so many gradients (`Mean`)."""
        return self.steps * (8 if self.sequences > 1 else 4) * (1 + gradients)

    def dtype(self, problem: BlockProblem) -> torch.dtype:
        """The dtype in which learning steps multiply; statistics, teacher and pruned path keep the run's dtype."""
        return learning_dtype(problem.dtype, problem.device) if self.autocast else problem.dtype

    def _steps(self, samples: int, seed: int) -> list[list[int]]:
        """The places of the sequences of each step; every pass over the calibration set has its own order."""
        generator = torch.Generator().manual_seed(seed)
        order: list[list[int]] = []
        while len(order) < self.steps:
            order += one_pass(range(samples), self.sequences, generator)
        return order[: self.steps]

    def _converged(self, losses: list[Tensor], in_pass: int) -> bool:
        """Whether a pass has just ended that lowered the loss by less than the tolerance.

        The host waits for the device to see it. Where passes are short, it therefore looks only after several of them.

        Args:
            losses: of all steps until now.
            in_pass: number of steps of a pass.
        """
        apart = in_pass * -(-LOOK_EVERY // in_pass)
        if not self.tolerance or len(losses) % apart or len(losses) < 2 * in_pass:
            return False
        values = _fetched(losses[-2 * in_pass :])
        return sum(values[in_pass:]) > (1 - self.tolerance) * sum(values[:in_pass])


def _fetched(losses: list[Tensor]) -> list[float]:
    """Scalars as numbers; the host waits once."""
    values: list[float] = torch.stack(losses).tolist()
    return values
