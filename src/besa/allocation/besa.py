"""BESA: learn the pruning rate of each row or linear from the error of the block's output (ICLR 2024, section 3.2).

Shape suffixes: N sequences, T tokens, C channels, O rows, I columns, D candidate pruning rates, R rate groups
(O when each row learns a rate of its own, 1 when the linear shares one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from besa.allocation.problem import Allocated, BlockProblem, RankedLinear
from besa.budget import Budget, apportion
from besa.losses import reconstruction_error
from besa.masks import candidate_ranks, straight_through
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
    candidate_step: float = Field(default=0.01, gt=0, le=0.5, description="distance of the candidate pruning rates")
    start_width: float = Field(default=0.1, gt=0, description="spread of the first beta around the target")
    epochs: int = Field(default=1, ge=1, description="passes over the calibration set, at most; a step is one sequence")
    travel: float = Field(
        default=8.0, gt=0, description="logits that Adam's steps add up to; they fall linearly to zero"
    )
    penalty: float = Field(
        default=100.0, ge=0, description="weight λ of the sparsity term of eq. 1, as a multiple of the loss at the step"
    )
    tolerance: float = Field(
        default=0.01, ge=0, description="stop after an epoch that lowers the loss by a smaller share"
    )

    def allocate(self, problem: BlockProblem) -> Allocated:
        """Learn the block's rates and apportion its zeros to rows (lines 5 to 10 of Algorithm 1).

        Linears that no token reached have nothing to learn from: they keep the sparsity of their budget.

        Raises:
            BesaError: the block has more zeros already than it is to end with.
        """
        starts = {
            name: LearnedRates.start(problem.linears[name], budget.sparsity, self)
            for budget in problem.budgets
            for name in budget.names
        }
        learned = {
            name: starts[name]
            for budget in problem.budgets
            for name in budget.names
            if 0 < budget.zeros < budget.weights and problem.linears[name].reached
        }
        losses = self._learn(problem, starts, learned) if learned else []
        counts: dict[str, Tensor] = {}
        for budget in problem.budgets:
            parts = [starts[name] for name in budget.names]
            rates = torch.cat([part.row_rates() for part in parts])
            widths = torch.cat([torch.full((part.rows,), part.width) for part in parts])
            zeros_now = torch.cat([part.linear.zeros_O for part in parts])
            shares = apportion(rates, widths, budget.zeros, zeros_now).split([part.rows for part in parts])
            counts |= dict(zip(budget.names, shares, strict=True))
        return Allocated(counts, losses)

    def _learn(
        self, problem: BlockProblem, starts: dict[str, LearnedRates], learned: dict[str, LearnedRates]
    ) -> list[float]:
        """Descend on eq. 1; returns the reconstruction loss at every step."""
        with torch.no_grad():
            constant = {name: part.masked_weight(part.beta()) for name, part in starts.items() if name not in learned}
        samples = len(problem.inputs_NTC)
        steps = self.epochs * samples
        optimizer = torch.optim.Adam([part.logits_RD for part in learned.values()], lr=2 * self.travel / steps)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        generator = torch.Generator().manual_seed(problem.seed)
        losses: list[float] = []
        for _ in range(self.epochs):
            for chosen_N in torch.randperm(samples, generator=generator).split(1):
                optimizer.zero_grad()
                masked, missed = self._masked(problem.budgets, learned)
                y_NTC = problem.block(problem.inputs_NTC[chosen_N].to(problem.device), constant | masked)
                loss = reconstruction_error(y_NTC, problem.targets_NTC[chosen_N].to(problem.device))
                # Relative to the loss, one λ serves any sparsity and model: the loss grows tenfold from 50 to 90 %.
                (loss + self.penalty * loss.detach() * missed).backward()  # eq. 1
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
            if self._converged(losses, samples):
                break
        return losses

    def _masked(self, budgets: list[Budget], learned: dict[str, LearnedRates]) -> tuple[dict[str, Tensor], Tensor]:
        """Masked weights by name, and the squared relative distance of expected sparsities from targets (scalar).

        By the count rule the masks meet the budgets at every step: what alpha misses is made up for by one shift of all
        rates, as the exact budget does in the end. So the loss is always that of the sparsity asked for.
        """
        masked: dict[str, Tensor] = {}
        missed = []
        for budget in budgets:
            parts = {name: learned[name] for name in budget.names if name in learned}
            if not parts:
                continue
            betas = {name: part.beta() for name, part in parts.items()}
            alphas = {name: betas[name] @ part.rates_D for name, part in parts.items()}  # eq. 3
            weights = {name: part.linear.w_OI.numel() for name, part in parts.items()}
            zeros = torch.stack([alphas[name].mean() * weights[name] for name in parts]).sum()
            sparsity = zeros / sum(weights.values())
            shift = _shift([(alphas[name].detach(), weights[name]) for name in parts], budget.sparsity)
            masked |= {name: part.masked_weight(betas[name], shift) for name, part in parts.items()}
            missed.append(((sparsity - budget.sparsity) / budget.sparsity) ** 2)
        return masked, torch.stack(missed).sum()

    def _converged(self, losses: list[float], samples: int) -> bool:
        """Whether the last epoch brought less than the tolerance; epochs see the same sequences in another order."""
        if len(losses) < 2 * samples:
            return False
        return sum(losses[-samples:]) > (1 - self.tolerance) * sum(losses[-2 * samples : -samples])


def _shift(rates: list[tuple[Tensor, int]], sparsity: float) -> Tensor:
    """What to add to all rates so that they prune the share `sparsity`, each rate staying within [0, 1].

    Args:
        rates: of each linear its rates (R,) and its number of weights.
        sparsity: to be met.
    """
    alpha_R = torch.cat([alpha_R for alpha_R, _ in rates])
    share_R = torch.cat([torch.full_like(alpha_R, weights / len(alpha_R)) for alpha_R, weights in rates])
    share_R /= share_R.sum()
    low, high = alpha_R.new_tensor(-1.0), alpha_R.new_tensor(1.0)
    for _ in range(20):
        middle = (low + high) / 2
        below = (alpha_R + middle).clamp_(0, 1) @ share_R < sparsity
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def candidate_rates(step: float) -> Tensor:
    """Candidate pruning rates p_d = 0, step, …, 1 (D,), float64; the step is adjusted to divide 1 evenly.

    The paper sets the last coefficient to zero so that the most important weight always stays; besa keeps it, so that
    any target sparsity below 1 can be reached.
    """
    intervals = round(1 / step)
    return torch.arange(intervals + 1, dtype=torch.float64) / intervals


def starting_logits(rates_D: Tensor, target: float, width: float) -> Tensor:
    """Logits (D,) of a bell of standard deviation `width`, placed so that alpha (eq. 3) is the target."""
    low = -20.0 * len(rates_D)  # so steep that neighbours differ by e²⁰: alpha as good as 0, or as good as 1
    high = width**-2 - low
    for _ in range(100):
        slope = (low + high) / 2  # centre of the bell / width²
        logits_D = slope * rates_D - rates_D**2 / (2 * width**2)
        alpha = float(logits_D.softmax(0) @ rates_D)
        low, high = (slope, high) if alpha < target else (low, slope)
    return (logits_D - logits_D.max()).float()


@dataclass(frozen=True)
class LearnedRates:
    """One linear's coefficients, and what turns them into a masked weight.

    Attributes:
        linear: the ranked weight, constant.
        mask: the mask rule, ``count`` or ``probability``.
        rates_D: candidate pruning rates p_d, float32.
        ranks_D: how many ranks of a row each candidate prunes.
        logits_RD: what is learned; beta is their softmax.
        taken_ID: 1.0 where candidate d prunes rank j.
    """

    linear: RankedLinear
    mask: str
    rates_D: Tensor
    ranks_D: Tensor
    logits_RD: Tensor
    taken_ID: Tensor

    @classmethod
    def start(cls, linear: RankedLinear, target: float, settings: Besa) -> LearnedRates:
        """Every rate at the target."""
        device = linear.w_OI.device
        rows, width = linear.w_OI.shape
        rates_D = candidate_rates(settings.candidate_step)
        logits_D = starting_logits(rates_D, target, settings.start_width)
        logits_RD = logits_D.repeat(rows if settings.rates == "row" else 1, 1).to(device).requires_grad_()
        ranks_D = candidate_ranks(rates_D, width).to(device)
        taken_ID = (torch.arange(width, device=device)[:, None] < ranks_D).float()
        rates_D = rates_D.float().to(device)
        return cls(linear, settings.mask, rates_D, ranks_D, logits_RD, taken_ID)

    @property
    def rows(self) -> int:
        """O."""
        return self.linear.w_OI.shape[0]

    @property
    def width(self) -> int:
        """I."""
        return self.linear.w_OI.shape[1]

    def beta(self) -> Tensor:
        """Coefficients on the simplex (R, D)."""
        return self.logits_RD.softmax(dim=-1)

    def row_rates(self) -> Tensor:
        """alpha of each row (O,), float64 on the CPU, without gradient."""
        return (self.beta().detach() @ self.rates_D).double().cpu().expand(self.rows)

    def masked_weight(self, beta_RD: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        """W ⊙ M (O, I) with the hard mask of this step; gradients reach beta straight through (eqs. 4 to 6)."""
        counts_O = self.counts(beta_RD.detach(), shift).expand(self.rows)
        return straight_through(beta_RD, self.linear.w_OI, self.linear.ranks_OI, counts_O, self.taken_ID)

    def counts(self, beta_RD: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        """How many of the lowest ranks of each row go (R,), by the mask rule.

        The probability of eq. 4 never rises with rank, so eq. 5 too prunes a row's lowest ranks: those that the largest
        candidate d prunes whose tail probability Σ_{e≥d} beta_e still reaches alpha.

        Args:
            beta_RD: coefficients.
            shift: added to every rate by the count rule.
        """
        alpha_R = beta_RD @ self.rates_D
        if self.mask == "count":
            return ((alpha_R + shift) * self.width + 1e-3).floor().long().clamp_(0, self.width)
        tail_RD = beta_RD.flip(-1).cumsum(-1).flip(-1)
        reaching_R = (tail_RD >= alpha_R[:, None]).sum(dim=-1) - 1  # tails fall with d: the last that reaches
        return self.ranks_D[reaching_R.clamp_min_(0)]
