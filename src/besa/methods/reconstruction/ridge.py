"""Least squares on a mask with a ridge towards the dense weights, as strong as tokens that were held out ask for.

Solved for one text without a ridge, weights become worse than unsolved ones on texts of another kind. The ridge is a
share of each input's own squared norm, so that channels with massive activations do not rule it.

Shape suffixes: O rows (output channels), I columns (input channels), R ridges to choose from.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from besa.counting.precision import products_in
from besa.observing.input_statistics import InputStatistics

RIDGES = (3.0, 1.0, 0.5, 0.2, 0.05, 0.01)  # shares of each input's squared norm, to choose from
ROWS = 64  # the ridge of a linear is chosen on so many of its rows, at most
STEPS = 3  # of conjugate gradient, for each ridge to choose from


def best_ridge(dense_OI: Tensor, kept_OI: Tensor, statistics: InputStatistics) -> Tensor:
    """The ridge (scalar) with the least error on held-out tokens. The host does not wait for the device.

    Each is tried from the solution of the stronger one before.

    Args:
        dense_OI: the dense weight, of all rows; rows at equal distances decide.
        kept_OI: True where a weight is kept.
        statistics: of the linear's input.
    """
    every = -(-len(dense_OI) // ROWS)
    dense_OI, kept_OI = dense_OI[::every], kept_OI[::every]
    w_OI = dense_OI.where(kept_OI, 0).float()
    errors = []
    ridges_R = torch.tensor(RIDGES).to(dense_OI.device)
    for ridge in ridges_R:
        w_OI = solve(dense_OI, kept_OI, with_ridge(statistics, ridge), STEPS, w_OI)
        errors.append(held_out_error(w_OI, dense_OI, statistics))
    return ridges_R[torch.stack(errors).argmin()]


def with_ridge(statistics: InputStatistics, ridge: Tensor) -> Tensor:
    """Σ x xᵀ (I, I) with its diagonal times 1 + `ridge` (scalar).

    A channel that is zero in the tokens to solve for has Σ x² of those that are held out, or 1 if it is always zero.
    """
    assert statistics.gram_II is not None, "the recipe did not ask for the Gram matrix"
    hessian_II = statistics.gram_II.to(torch.float32, copy=True)
    diagonal_I = hessian_II.diagonal()
    diagonal_I *= 1 + ridge
    known_I = statistics.squares_I.float()
    diagonal_I.copy_(diagonal_I.where(diagonal_I > 0, known_I.where(known_I > 0, 1.0)))
    return hessian_II


def held_out_error(w_OI: Tensor, dense_OI: Tensor, statistics: InputStatistics) -> Tensor:
    """‖W X − W̄ X‖² over the held-out tokens X (scalar)."""
    assert statistics.held_II is not None, "the recipe did not ask for the Gram matrix"
    change_OI = w_OI.float() - dense_OI.float()
    return ((change_OI @ statistics.held_II.float()) * change_OI).sum()


def better(changed_OI: Tensor, unchanged_OI: Tensor, dense_OI: Tensor, statistics: InputStatistics) -> Tensor:
    """Whichever of two weights (O, I) has the lower error on held-out tokens; rows at equal distances decide."""
    return changed_OI.where(is_better(changed_OI, unchanged_OI, dense_OI, statistics), unchanged_OI)


def is_better(changed_OI: Tensor, unchanged_OI: Tensor, dense_OI: Tensor, statistics: InputStatistics) -> Tensor:
    """Whether (scalar) the first of two weights has the lower error on held-out tokens, as of `better`."""
    every = -(-len(dense_OI) // ROWS)
    changed, unchanged = (
        held_out_error(w_OI[::every], dense_OI[::every], statistics) for w_OI in (changed_OI, unchanged_OI)
    )
    return changed < unchanged


def solve(
    dense_OI: Tensor, kept_OI: Tensor, hessian_II: Tensor, iterations: int, start_OI: Tensor | None = None
) -> Tensor:
    """Minimise (W − W̄) H (W − W̄)ᵀ of each row over its kept weights; returns W (O, I), the other weights zero.

    Conjugate gradient, for all rows at once, each with its own direction and step length. The preconditioner is H's
    diagonal. Products are of half precision if the weight is (`products_in`). Those with H are written as a linear's,
    which takes H transposed, and is the faster form on a CPU: H is symmetric.

    Args:
        dense_OI: W̄, in its dtype.
        kept_OI: True where a weight is kept.
        hessian_II: H, positive definite.
        iterations: steps, each a product with H.
        start_OI: weights to start from, which obey the mask; by default the kept weights of W̄.
    """
    scale_I, pruned_OI = 1 / hessian_II.diagonal(), ~kept_OI
    w_OI = dense_OI.where(kept_OI, 0).float() if start_OI is None else start_OI.clone()
    with products_in(dense_OI.dtype):
        residual_OI = linear(dense_OI.float() - w_OI, hessian_II).masked_fill_(pruned_OI, 0)
        direction_OI = residual_OI * scale_I
        descent_O = (residual_OI * direction_OI).sum(dim=1)
        for _ in range(iterations):
            product_OI = linear(direction_OI, hessian_II).masked_fill_(pruned_OI, 0)
            curvature_O = (direction_OI * product_OI).sum(dim=1)
            step_O = torch.where(curvature_O > 0, descent_O / curvature_O, 0)  # 0: the row is solved
            w_OI.addcmul_(step_O[:, None], direction_OI)
            residual_OI.addcmul_(-step_O[:, None], product_OI)
            scaled_OI = residual_OI * scale_I
            before_O, descent_O = descent_O, (residual_OI * scaled_OI).sum(dim=1)
            turn_O = torch.where(before_O > 0, descent_O / before_O, 0)
            direction_OI = scaled_OI.addcmul_(turn_O[:, None], direction_OI)
    return w_OI
