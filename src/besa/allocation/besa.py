"""BESA: learn the pruning rate of each row or linear from the error of the block's output (ICLR 2024, section 3.2).

Shape suffixes: N sequences, T tokens, C channels, O rows, R rate groups (rows, or linears whose rows share a rate).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from besa.allocation.masked import MaskedLinears
from besa.allocation.problem import Allocated, BlockProblem, first_tokens
from besa.allocation.rates import Rates
from besa.budget import Budget, apportion
from besa.losses import reconstruction_error
from besa.machine import multiplies_bfloat16
from besa.masks import hard_mask
from besa.settings import Settings


class Besa(Settings):
    """Rates learned by gradient descent on coefficients beta, then made integers that meet the budget exactly."""

    method: Literal["besa"] = "besa"
    rates: Literal["row", "layer"] = Field(default="row", description="one rate for each row, or for each linear")
    teacher: Literal["dense", "pruned"] = Field(
        default="dense", description="inputs of the teacher: the dense path's (Algorithm 1) or the pruned path's"
    )
    mask: Literal["count", "probability"] = Field(
        default="count",
        description="prune ⌊alpha·I⌋ weights of a row, or those whose probability reaches alpha (eq. 5)",
    )
    candidate_step: float = Field(default=0.01, ge=0.001, le=0.5, description="distance of the candidate pruning rates")
    start_width: float = Field(default=0.1, gt=0, description="spread of the first beta around the target")
    crop: float = Field(
        default=0.5, gt=0, le=1, description="share of a sequence, from its beginning, that a step sees"
    )
    steps: int = Field(
        default=64, ge=1, description="learning steps, a sequence each; those beyond the calibration set see it again"
    )
    tolerance: float = Field(
        default=0.01, ge=0, description="stop after a pass over the calibration set that lowers the loss by less"
    )
    autocast: bool = Field(
        default=True, description="multiply in bfloat16 while learning, where a float32 run is faster with it"
    )
    travel: float = Field(
        default=12.0, gt=0, description="logits that Adam's steps add up to; they fall linearly to zero"
    )
    penalty: float = Field(
        default=100.0, ge=0, description="weight λ of the sparsity term of eq. 1, as a multiple of the loss at the step"
    )

    def allocate(self, problem: BlockProblem) -> Allocated:
        """Learn the block's rates and apportion its zeros to rows (lines 5 to 10 of Algorithm 1).

        Linears that no token reached have nothing to learn from: they keep the sparsity of their budget.

        Raises:
            BesaError: the block has more zeros already than it is to end with.
        """
        parts = [part for budget in problem.budgets if (part := self._start(problem, budget))]
        losses = self._learn(problem, parts) if parts else []
        learned = {name: rates_O for part in parts for name, rates_O in part.row_rates().items()}
        counts: dict[str, Tensor] = {}
        for budget in problem.budgets:
            linears = [problem.linears[name] for name in budget.names]
            even = [torch.full((len(linear.w_OI),), budget.sparsity, dtype=torch.float64) for linear in linears]
            rates = torch.cat([learned.get(name, rates_O) for name, rates_O in zip(budget.names, even, strict=True)])
            widths = torch.cat([torch.full((len(linear.w_OI),), linear.w_OI.shape[1]) for linear in linears])
            zeros_now = torch.cat([linear.zeros_O for linear in linears])
            shares = apportion(rates, widths, budget.zeros, zeros_now).split([len(linear.w_OI) for linear in linears])
            counts |= dict(zip(budget.names, shares, strict=True))
        return Allocated(counts, losses)

    def _start(self, problem: BlockProblem, budget: Budget) -> MaskedLinears | None:
        """Those linears of a budget that can learn, every rate at the target."""
        linears = {name: problem.linears[name] for name in budget.names if problem.linears[name].reached}
        if not linears or not 0 < budget.zeros < budget.weights:
            return None
        rates = Rates.start(
            [(linear.w_OI.shape[0], linear.w_OI.shape[1]) for linear in linears.values()],
            budget.sparsity,
            per_row=self.rates == "row",
            step=self.candidate_step,
            spread=self.start_width,
            mask=self.mask,
            device=problem.device,
        )
        return MaskedLinears(linears, rates, self._dtype(problem))

    def _learn(self, problem: BlockProblem, parts: list[MaskedLinears]) -> list[float]:
        """Descend on eq. 1; returns the reconstruction loss at every step."""
        logits = [part.rates.logits_RD for part in parts]
        optimizer = torch.optim.Adam(logits, lr=2 * self.travel / self.steps, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self.steps)
        weights = _constant(problem, {name for part in parts for name in part.linears})
        tokens = first_tokens(problem.inputs_NTC[:1].shape[1], self.crop)
        dtype = self._dtype(problem)
        autocast = torch.autocast(problem.device.type, dtype, enabled=dtype != problem.dtype)
        losses: list[float] = []
        for chosen_N in self._sequences(len(problem.inputs_NTC), problem.seed):
            betas = [part.rates.beta() for part in parts]
            alphas = [part.rates.alpha(beta_RD) for part, beta_RD in zip(parts, betas, strict=True)]
            for part, beta_RD, alpha_R in zip(parts, betas, alphas, strict=True):
                weights |= part.weights(part.rates.counts(beta_RD, alpha_R))
            with autocast:
                y_NTC = problem.block(problem.inputs_NTC[chosen_N][:, :tokens].to(problem.device), weights)
            loss = reconstruction_error(y_NTC, problem.targets_NTC[chosen_N][:, :tokens].to(problem.device))
            loss.backward()
            # Relative to the loss, one λ serves any sparsity and model: the loss grows tenfold from 50 to 90 %.
            weight = self.penalty * loss.detach()  # eq. 1
            missed = [part.rates.missed(alpha_R) for part, alpha_R in zip(parts, alphas, strict=True)]
            torch.autograd.backward([*betas, *missed], [*(part.gradient() for part in parts), *[weight] * len(missed)])
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(float(loss.detach()))
            if self._converged(losses, len(problem.inputs_NTC)):
                break
        return losses

    def _converged(self, losses: list[float], samples: int) -> bool:
        """Whether a pass just ended that brought less than the tolerance; all passes see the same sequences."""
        if len(losses) % samples or len(losses) == samples:
            return False
        return sum(losses[-samples:]) > (1 - self.tolerance) * sum(losses[-2 * samples : -samples])

    def _dtype(self, problem: BlockProblem) -> torch.dtype:
        """In which learning steps multiply; statistics, teacher and pruned path keep the run's precision."""
        faster = self.autocast and problem.dtype == torch.float32 and multiplies_bfloat16(problem.device)
        return torch.bfloat16 if faster else problem.dtype

    def _sequences(self, samples: int, seed: int) -> Iterator[Tensor]:
        """One sequence for each step (1,), every pass over the calibration set in an order of its own."""
        generator = torch.Generator().manual_seed(seed)
        passes = -(-self.steps // samples)
        order = torch.cat([torch.randperm(samples, generator=generator) for _ in range(passes)])
        yield from order[: self.steps].split(1)


def _constant(problem: BlockProblem, learned: set[str]) -> dict[str, Tensor]:
    """Masked weights (O, I) of the linears that do not learn, at the sparsity of their budget."""
    weights = {}
    for budget in problem.budgets:
        for name in set(budget.names) - learned:
            linear = problem.linears[name]
            rows, columns = linear.w_OI.shape
            counts_O = torch.full((rows,), int(budget.sparsity * columns + 1e-3), device=linear.w_OI.device)
            weights[name] = linear.w_OI * hard_mask(linear.ranks_OI, counts_O)
    return weights
