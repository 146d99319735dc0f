"""The descent on a block's output error, whatever it moves: pruning rates, clipping of a quantiser, or both.

Shape suffixes: N sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from besa.methods.allocation.changing import ChangingLinears
from besa.methods.allocation.problem import BlockProblem, first_tokens
from besa.settings import Settings
from besa.system.machine import learning_dtype


class Descent(Settings):
    """Adam, a sequence at a time, with steps that fall linearly to zero."""

    crop: float = Field(
        default=0.5, gt=0, le=1, description="share of a sequence, from its beginning, that a step sees"
    )
    steps: int = Field(
        default=64, ge=1, description="learning steps, a sequence each; those beyond the calibration set see it again"
    )
    tolerance: float = Field(
        default=0.01,
        ge=0,
        description="stop after a pass over the calibration set that lowers the loss by less; 0: never",
    )
    autocast: bool = Field(
        default=True, description="multiply in bfloat16 while learning, where a float32 run is faster with it"
    )
    travel: float = Field(
        default=12.0, gt=0, description="logits that Adam's steps add up to; they fall linearly to zero"
    )
    plain: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the loss that is the plain squared error, which massive activations rule; 0.5 at 70 %",
    )
    penalty: float = Field(
        default=100.0, ge=0, description="weight λ of the sparsity term of eq. 1, as a multiple of the loss at the step"
    )

    def descend(
        self, problem: BlockProblem, parts: Sequence[ChangingLinears], constant: dict[str, Tensor]
    ) -> list[float]:
        """Descend on eq. 1; returns the reconstruction loss at every step.

        Args:
            problem: the block.
            parts: what learns.
            constant: other weights by full name that are not the block's own.
        """
        parameters = [parameter for part in parts for parameter in part.parameters]
        optimizer = torch.optim.Adam(parameters, lr=2 * self.travel / self.steps, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self.steps)
        weights = constant | {name: leaf for part in parts for name, leaf in part.weights.items()}
        samples, tokens = len(problem.inputs_NTC), first_tokens(problem.inputs_NTC[:1].shape[1], self.crop)
        dtype = self.dtype(problem)
        autocast = torch.autocast(problem.device.type, dtype, enabled=dtype != problem.dtype)
        losses: list[float] = []
        for chosen_N in self._sequences(samples, problem.seed):
            for part in parts:
                part.update()
            with autocast:
                loss = problem.error(chosen_N, tokens, weights, self.plain)
            loss.backward()
            for part in parts:
                # Relative to the loss, one λ serves any sparsity and model: the loss grows tenfold from 50 to 90 %.
                part.backward(self.penalty * loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(float(loss.detach()))
            if self._converged(losses, samples):
                break
        return losses

    def dtype(self, problem: BlockProblem) -> torch.dtype:
        """In which learning steps multiply; statistics, teacher and pruned path keep the run's precision."""
        return learning_dtype(problem.dtype, problem.device) if self.autocast else problem.dtype

    def _sequences(self, samples: int, seed: int) -> Iterator[Tensor]:
        """One sequence for each step (1,), every pass over the calibration set in an order of its own."""
        generator = torch.Generator().manual_seed(seed)
        passes = -(-self.steps // samples)
        order = torch.cat([torch.randperm(samples, generator=generator) for _ in range(passes)])
        yield from order[: self.steps].split(1)

    def _converged(self, losses: list[float], samples: int) -> bool:
        """Whether a pass just ended that brought less than the tolerance; all passes see the same sequences."""
        if not self.tolerance or len(losses) % samples or len(losses) == samples:
            return False
        return sum(losses[-samples:]) > (1 - self.tolerance) * sum(losses[-2 * samples : -samples])
