"""BESA: learn the pruning rate of each row or linear from the error of the block's output (ICLR 2024, section 3.2).

Shape suffixes: O rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from besa.counting.budget import Budget
from besa.counting.masks import hard_mask
from besa.counting.precision import widest
from besa.kernels.reference import NEARLY
from besa.methods.allocation.allocator import Allocator
from besa.methods.allocation.changing import ChangingLinears
from besa.methods.allocation.descent import Descent
from besa.methods.allocation.problem import Allocated, BlockProblem
from besa.methods.allocation.rates import Rates
from besa.methods.apportioning import counted
from besa.models.units import Granularity

OPTIMIZER = 7  # copies of the logits: themselves, gradient, two moments, beta, its gradient, the tails


class Besa(Descent, Allocator):
    """Pruning rates are learned by gradient descent on coefficients beta, then rounded to meet the budget exactly.

    If the clipping of a quantiser is learned jointly, one descent moves rates and clipping.
    """

    method: Literal["besa"] = "besa"
    rates: Literal["row", "layer"] = Field(default="row", description="one rate for each row, or for each linear")
    granularity: Granularity = Field(
        default="block", description="which linears share a budget, and whose output the loss compares (Table 6)"
    )
    teacher: Literal["dense", "pruned"] = Field(
        default="dense", description="inputs of the teacher: the dense path's (Algorithm 1) or the pruned path's"
    )
    mask: Literal["count", "probability"] = Field(
        default="count",
        description="prune ⌊alpha·I⌋ weights of a row, or those whose probability reaches alpha (eq. 5)",
    )
    candidate_step: float = Field(default=0.01, ge=0.001, le=0.5, description="distance of the candidate pruning rates")
    start_width: float = Field(default=0.1, ge=1e-6, description="spread of the first beta around the target")

    @property
    def scope(self) -> Granularity:
        """The setting `granularity`."""
        return self.granularity

    @property
    def descent(self) -> Descent:
        """The allocation's own settings."""
        return self

    @property
    def teacher_path(self) -> Literal["dense", "pruned"] | None:
        """The setting `teacher`; None if the granularity is `linear`, which needs no teacher."""
        return None if self.granularity == "linear" else self.teacher

    def learning_bytes(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Bytes of the coefficients of all rate groups, and of the summed gradients of all rows."""
        rows = sum(rows_of_linear for rows_of_linear, _ in shapes)
        groups = rows if self.rates == "row" else len(shapes)
        return 4 * round(1 / self.candidate_step) * (OPTIMIZER * groups + rows)

    def summed_bytes(self, learning: Sequence[tuple[int, int]], clipping: int) -> int:
        """At every step the loss, a gradient for each row and candidate rate, and those of the clippings."""
        rows = sum(rows_of_linear for rows_of_linear, _ in learning)
        return self.steps_bytes(rows * (round(1 / self.candidate_step) + 1) + clipping) if learning else 0

    def allocate(self, problem: BlockProblem) -> Allocated:
        """Learn the block's rates and apportion its zeros to rows (lines 5 to 10 of Algorithm 1).

        Linears that no token reached cannot learn. They get the sparsity of their budget.

        Raises:
            BesaError: the block already has more zeros than its budget.
        """
        if self.granularity == "linear":
            problem = replace(problem, own_outputs=True)
        parts = [part for budget in problem.budgets if (part := self._start(problem, budget))]
        learning = {name for part in parts for name in part.weights}
        losses = self.descend(problem, parts, _constant(problem, learning)) if parts else []
        learned = {name: rates_O for part in parts if part.rates for name, rates_O in part.row_rates().items()}
        counts: dict[str, Tensor] = {}
        for budget in problem.budgets:
            zeros = {name: problem.linears[name].zeros_O for name in budget.names}
            if not budget.zeros and problem.clippings:  # rounding decides its zeros
                counts |= zeros
                continue
            widths = {name: problem.linears[name].w_OI.shape[1] for name in zeros}
            dtype = widest(problem.device)
            rates = {
                name: learned[name] if name in learned else torch.full_like(zeros_O, budget.sparsity, dtype=dtype)
                for name, zeros_O in zeros.items()
            }
            counts |= counted(rates, widths, budget.zeros, zeros)
        return Allocated(counts, losses)

    def _start(self, problem: BlockProblem, budget: Budget) -> ChangingLinears | None:
        """The linears of a budget that can learn, with every rate at its start; None if no linear can.

        Where a budget prunes nothing, only the clipping of its linears can.
        """
        linears = {name: problem.linears[name] for name in budget.names if problem.linears[name].reached}
        if linears and not budget.zeros and problem.clippings:
            return ChangingLinears(linears, None, problem.clippings, self.dtype(problem))
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
        return ChangingLinears(linears, rates, problem.clippings, self.dtype(problem))


def _constant(problem: BlockProblem, learned: set[str]) -> dict[str, Tensor]:
    """Masked weights (O, I) of the linears that do not learn, at the sparsity of their budget."""
    weights = {}
    for budget in problem.budgets:
        for name in set(budget.names) - learned:
            linear = problem.linears[name]
            rows, columns = linear.w_OI.shape
            counts_O = torch.full((rows,), int(budget.sparsity * columns + NEARLY), device=linear.w_OI.device)
            weights[name] = linear.w_OI * hard_mask(linear.ranks_OI, counts_O)
    return weights
