"""Gradient descent on the output error of a block, for pruning rates, the clipping of a quantiser, or both.

Shape suffixes: N sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from besa.methods.allocation.best import Best
from besa.methods.allocation.changing import ChangingLinears
from besa.methods.allocation.problem import BlockProblem, first_tokens
from besa.methods.steps import Mean, mean_over_ranks, one_pass, split
from besa.observing.losses import error_by_token, reconstruction_error
from besa.settings import Learning
from besa.system.machine import learning_dtype, loss_scaler

LOOKS = 8  # at the held-out sequences, in all steps; the host waits at each
IN_VAIN = 2  # such looks in a row end a descent
# Gradients that Adam sees are around 1, whatever the model: some of them are far smaller, and it must not damp those.
EPS = 1e-16
SMALLEST = 1e-30  # a loss, to divide by


class Descent(Learning):
    """Adam with a step size that falls linearly to zero, on the mean gradient of a few sequences per step.

    The sequences of a step are spread evenly over the calibration set. Ranks therefore share them, and compute together
    what one rank computes by itself.

    Rates by row are thousands of coefficients. Where there are few sequences, they come to fit these alone. Some are
    therefore held out, and say which rates are kept.
    """

    crop: float = Field(
        default=0.5, gt=0, le=1, description="share of a sequence, from its beginning, that a step uses"
    )
    steps: int = Field(default=64, ge=1, description="learning steps; those beyond a pass repeat the calibration set")
    hold_out: bool = Field(
        default=True,
        description="where steps go more than twice over the sequences, hold some out, keep what is best on them, and "
        "stop when they gain no more; false: take all steps",
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
        tokens = first_tokens(problem.inputs_NTC[:1].shape[1], self.crop)
        dtype = self.dtype(problem)
        autocast = torch.autocast(problem.device.type, dtype, enabled=dtype != problem.dtype)
        scaler = loss_scaler(dtype, problem.device, tokens * problem.inputs_NTC.shape[-1])
        weight = torch.full((), self.penalty * count, device=problem.device)
        loss_of = partial(reconstruction_error, plain=self.plain)

        def step(sequences: Sequence[int]) -> Tensor:
            for part in parts:
                part.update()
            loss, mean = torch.zeros((), device=problem.device), Mean(len(sequences))
            for chosen in problem.share.own(sequences):
                with autocast:
                    error = problem.error(chosen, tokens, weights, loss_of)
                scaler.scale(error).backward()
                for part in parts:
                    part.finish_pass()
                loss.copy_(error.detach())
                mean.add([loss, *(gradient for part in parts for gradient in part.gradients)])
            mean.into([loss, *(gradient for part in parts for gradient in part.gradients)])
            # The gradient of the loss's logarithm, by parameters: neither a small loss nor a wide block makes it small.
            factor = count / loss.clamp_min(SMALLEST)
            for part in parts:
                part.backward(factor, scaler.scale(weight))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            schedule.step()
            return loss

        def held_out_error() -> float:
            for part in parts:
                part.update()
            with torch.no_grad(), autocast:
                own = problem.share.own(held)
                return mean_over_ranks([problem.error(place, tokens, weights, error_by_token) for place in own])

        held, learned = self._split(problem.share.total)
        best = Best(parameters, held_out_error, IN_VAIN) if held else None
        order = self._order(learned, problem.seed)
        losses: list[Tensor] = []
        while len(losses) < self.steps and not (best and best.passed):
            losses += map(step, order[len(losses) :][: self._between_looks])
            if best:
                best.look()
        if best:
            best.restore()
        values: list[float] = torch.stack(losses).tolist()  # the host waits once
        return values

    def held_out_passes(self, samples: int) -> int:
        """How often a held-out sequence goes through a block, at most.

        Args:
            samples: calibration sequences, over all ranks.
        """
        return len(self._split(samples)[0]) * (1 + -(-self.steps // self._between_looks))

    def steps_bytes(self, gradients: int) -> int:
        """Bytes that ranks add up in all steps, at most: in each, the loss and so many gradients (`Mean`)."""
        return self.steps * (8 if self.sequences > 1 else 4) * (1 + gradients)

    def dtype(self, problem: BlockProblem) -> torch.dtype:
        """The dtype in which learning steps multiply; statistics, teacher and pruned path keep the run's dtype."""
        return learning_dtype(problem.dtype, problem.device) if self.autocast else problem.dtype

    @property
    def _between_looks(self) -> int:
        """Steps from one look at the held-out sequences to the next."""
        return -(-self.steps // LOOKS)

    def _split(self, samples: int) -> tuple[list[int], list[int]]:
        """The places of the sequences to hold out, if any, and to learn from."""
        if self.hold_out and self.steps * self.sequences > 2 * samples:
            return split(samples)
        return [], list(range(samples))

    def _order(self, learned: Sequence[int], seed: int) -> list[list[int]]:
        """The places of the sequences of each step; every pass over those to learn from has its own order."""
        generator = torch.Generator().manual_seed(seed)
        order: list[list[int]] = []
        while len(order) < self.steps:
            order += one_pass(learned, self.sequences, generator)
        return order[: self.steps]
