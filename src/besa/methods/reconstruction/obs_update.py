"""SparseGPT: prune column by column; the columns to the right compensate (Frantar & Alistarh, 2023, arXiv 2301.00774).

Shape suffixes: O rows (output channels), R rows of this rank, I columns (input channels),
B columns of the present block of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from besa import kernels
from besa.counting.masks import hard_mask, rank
from besa.errors import BesaError
from besa.methods.apportioning import apportion
from besa.methods.reconstruction.rebuilder import Rebuilder
from besa.methods.reconstruction.ridge import best_ridge, better, with_ridge
from besa.methods.reconstruction.written import written
from besa.observing.input_statistics import InputStatistics, inverted
from besa.system import ranks

# From a block of columns, its updated weights (R, B) and its part of the factor (B, B): which weights are kept (R, B).
MaskRule = Callable[[slice, Tensor, Tensor], Tensor]


class OBSUpdate(Rebuilder):
    """Optimal-brain-surgeon update of the kept weights, left to right in blocks of columns.

    With an *adaptive* mask, each block of columns chooses its zeros by w²/[H⁻¹]ⱼⱼ of the updated weights. The number of
    zeros stays the same for the linear, but not for each row; SparseGPT does so, and on other kinds of text it can be
    worse than what it began with (docs/log.md). With a *fixed* mask, the zeros are the lowest ranks of each row, as the
    allocation chose them.
    """

    method: Literal["obs"] = "obs"
    columns: int = Field(default=128, ge=1, description="columns pruned before the columns to the right are updated")
    damping: float | None = Field(
        default=None,
        gt=0,
        description="added to the Hessian's diagonal as a share of its mean, as SparseGPT does; by default, held-out "
        "tokens choose a ridge, and weights that it does not help stay as they are",
    )
    mask: Literal["adaptive", "fixed"] = "fixed"
    solver_bytes: ClassVar[int] = 12

    @property
    def keeps_mask(self) -> bool:
        """Whether the mask is fixed."""
        return self.mask == "fixed"

    @property
    def own_importance(self) -> str | None:
        """obs if the mask is adaptive, and no held-out tokens compare it with the one of the allocation."""
        return "obs" if self.mask == "adaptive" and self.damping is not None else None

    def gathered_bytes(self, columns: int, item: int, group: int | None) -> int:
        """The rebuilt row in float32; before, if rows compete, its blocks of columns as their turn comes."""
        return 4 * columns * (2 if self.mask == "adaptive" and group is None else 1)

    def rebuild(
        self,
        w_OI: Tensor,
        ranks_OI: Tensor,
        counts_O: Tensor,
        statistics: InputStatistics,
        group: int | None = None,
    ) -> Tensor:
        """The pruned weight (O, I) in the dtype of `w_OI`, with exactly Σ `counts_O` zeros.

        Raises:
            BesaError: the damped Hessian is not positive definite.
        """
        first_OI, dense_OI = hard_mask(ranks_OI, counts_O), w_OI.float()
        if self.damping is None:
            inverse_II = inverted(with_ridge(statistics, best_ridge(w_OI, first_OI, statistics)))
        else:
            inverse_II = statistics.inverse_hessian(self.damping)
        factor_II = inverse_factor(inverse_II)
        if self.keeps_mask:
            blocks, rule = blocks_of(w_OI.shape[1], self.columns), fixed(first_OI)
        elif group is not None:
            blocks = blocks_of(w_OI.shape[1], group)
            rule = row_by_row(dense_OI == 0, statistics.dead_I, int(counts_O.sum()) // len(blocks) // len(w_OI))
        else:
            blocks = blocks_of(w_OI.shape[1], self.columns)
            rule = rows_compete(dense_OI == 0, statistics.dead_I, blocks, counts_O.sum())
        rebuilt_OI = sweep(dense_OI, factor_II, blocks, rule)
        written_OI = written(rebuilt_OI, rebuilt_OI != 0, w_OI.dtype)
        return written_OI if self.damping else better(written_OI, w_OI.where(first_OI, 0), w_OI, statistics)


def inverse_factor(inverse_II: Tensor) -> Tensor:
    """Upper triangular U (I, I) with H⁻¹ = Uᵀ U; row j over U_jj is the effect of removing weight j on later ones.

    Raises:
        BesaError: the inverse Hessian is not positive definite.
    """
    upper_II: Tensor
    upper_II, failed = torch.linalg.cholesky_ex(inverse_II, upper=True)
    if failed:
        raise BesaError(
            "The inverse Hessian of a linear's inputs is not positive definite: use more calibration samples or a "
            "larger damping in the recipe."
        )
    return upper_II


def blocks_of(width: int, columns: int) -> list[slice]:
    """The columns in blocks of so many; the last may be narrower."""
    return [slice(start, min(start + columns, width)) for start in range(0, width, columns)]


def sweep(w_OI: Tensor, factor_II: Tensor, blocks: Sequence[slice], rule: MaskRule) -> Tensor:
    """Prune weights from left to right, and update the columns to the right after each; returns the weight (O, I).

    Every rank sweeps its rows.

    Args:
        w_OI: float32 weight, not changed.
        factor_II: `inverse_factor` of the input's Hessian.
        blocks: of columns, which are pruned before the columns to the right are updated.
        rule: decides what is kept, block by block.
    """
    rows = len(w_OI)
    w_RI = w_OI[ranks.rows(rows)].clone()
    for block in blocks:
        block_RB, factor_BB = w_RI[:, block], factor_II[block, block]  # a view: updated in place
        kept_RB = rule(block, block_RB, factor_BB)
        error_RB = torch.empty_like(block_RB)
        kernels.swept(block_RB, kept_RB, factor_BB, error_RB)
        w_RI[:, block.stop :] -= error_RB @ factor_II[block, block.stop :]
    return ranks.gathered(w_RI, rows)


def fixed(kept_OI: Tensor) -> MaskRule:
    """The mask is given."""
    own = ranks.rows(len(kept_OI))

    def kept(block: slice, block_RB: Tensor, factor_BB: Tensor) -> Tensor:
        return kept_OI[own, block]

    return kept


def row_by_row(zero_OI: Tensor, dead_I: Tensor, zeros: int) -> MaskRule:
    """Every row of a block loses the same number of weights, as n:m patterns need.

    Args:
        zero_OI: weights that are zero already; they are pruned first.
        dead_I: channels that are always zero; their weights are pruned next.
        zeros: how many weights to prune in each row of a block.
    """
    own = ranks.rows(len(zero_OI))

    def kept(block: slice, block_RB: Tensor, factor_BB: Tensor) -> Tensor:
        return _order(block_RB, zero_OI[own, block], dead_I[block], factor_BB, block_RB.shape[1]) >= zeros

    return kept


def rows_compete(zero_OI: Tensor, dead_I: Tensor, blocks: Sequence[slice], zeros: Tensor) -> MaskRule:
    """All weights of a block compete; every rank sees the block of all ranks.

    Args:
        zero_OI: as of `row_by_row`.
        dead_I: likewise.
        blocks: of columns; they share the zeros in proportion to their width.
        zeros: how many weights to prune (scalar).
    """
    rows = len(zero_OI)
    shares = _shares(zero_OI, [block.stop - block.start for block in blocks], zeros)
    share_from = {block.start: share for block, share in zip(blocks, shares, strict=True)}

    def kept(block: slice, block_RB: Tensor, factor_BB: Tensor) -> Tensor:
        block_OB = ranks.gathered(block_RB, rows)
        order_OB = _order(block_OB, zero_OI[:, block], dead_I[block], factor_BB, block_OB.numel())
        return (order_OB >= share_from[block.start])[ranks.rows(rows)]

    return kept


def _order(block_OB: Tensor, zero_OB: Tensor, dead_B: Tensor, factor_BB: Tensor, together: int) -> Tensor:
    """The place of each weight in the pruning order of the `together` weights that compete; zeros come first."""
    prunable_OB = block_OB.masked_fill(zero_OB, 0)
    score_OB = (prunable_OB.square() / factor_BB.diagonal().square()).masked_fill_(dead_B, 0)
    return rank(score_OB.reshape(-1, together), prunable_OB.reshape(-1, together)).reshape(block_OB.shape)


def _shares(zero_OI: Tensor, sizes: list[int], zeros: Tensor) -> list[int]:
    """How many of the zeros each block of columns gets. The host waits for the device once."""
    total, *present = torch.cat([zeros.reshape(1), zero_OI.sum(dim=0)]).tolist()
    present_of_block = torch.stack([part.sum() for part in torch.tensor(present).split(sizes)])
    widths, rate = zero_OI.shape[0] * torch.tensor(sizes), total / zero_OI.numel()
    shares: list[int] = apportion(torch.full((len(sizes),), rate), widths, total, present_of_block).tolist()
    return shares
