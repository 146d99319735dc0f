"""SparseGPT: prune column by column; the columns to the right compensate (Frantar & Alistarh, 2023, arXiv 2301.00774).

Shape suffixes: O rows (output channels), R rows of this rank, I columns (input channels),
B columns of the present block of columns.
"""

from __future__ import annotations

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
        kept_OI = first_OI if self.mask == "fixed" else None
        if self.damping is None:
            inverse_II = inverted(with_ridge(statistics, best_ridge(w_OI, first_OI, statistics)))
        else:
            inverse_II = statistics.inverse_hessian(self.damping)
        columns = self.columns if self.keeps_mask or group is None else group
        rebuilt_OI = sweep(
            dense_OI,
            dense_OI == 0,
            statistics.dead_I,
            inverse_factor(inverse_II),
            columns,
            counts_O.sum(),
            kept_OI,
            per_row=group is not None,
        )
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


def sweep(
    w_OI: Tensor,
    zero_OI: Tensor,
    dead_I: Tensor,
    factor_II: Tensor,
    columns: int,
    zeros: Tensor,
    kept_OI: Tensor | None = None,
    per_row: bool = False,
) -> Tensor:
    """Prune weights from left to right, and update the columns to the right after each; returns the weight (O, I).

    Every rank sweeps its rows. Where rows compete, it sees each block of columns of all ranks first.

    Args:
        w_OI: float32 weight, not changed.
        zero_OI: weights that are zero already; they are pruned first.
        dead_I: channels that are always zero; their weights are pruned next.
        factor_II: `inverse_factor` of the input's Hessian.
        columns: width of a block; the blocks share the zeros in proportion to their width.
        zeros: how many weights to prune (scalar); unused with a fixed mask.
        kept_OI: the fixed mask; None to choose it block by block.
        per_row: whether every row of a block loses the same number, as n:m patterns need.
    """
    rows, width = w_OI.shape
    own = ranks.rows(rows)
    w_RI = w_OI[own].clone()
    starts = range(0, width, columns)
    sizes = [min(columns, width - start) for start in starts]
    if kept_OI is not None:
        shares = [0] * len(sizes)
    elif per_row:
        shares = [int(zeros) // len(sizes)] * len(sizes)
    else:
        shares = _shares(zero_OI, sizes, zeros)
    for start, size, share in zip(starts, sizes, shares, strict=True):
        end = start + size
        block_RB, factor_BB = w_RI[:, start:end], factor_II[start:end, start:end]  # a view: updated in place
        if kept_OI is not None:
            kept_RB = kept_OI[own, start:end]
        elif per_row:
            kept_RB = _order(block_RB, zero_OI[own, start:end], dead_I[start:end], factor_BB, size) >= share // rows
        else:
            block_OB = ranks.gathered(block_RB, rows)
            order_OB = _order(block_OB, zero_OI[:, start:end], dead_I[start:end], factor_BB, rows * size)
            kept_RB = (order_OB >= share)[own]
        error_RB = torch.empty_like(block_RB)
        kernels.swept(block_RB, kept_RB, factor_BB, error_RB)
        w_RI[:, end:] -= error_RB @ factor_II[start:end, end:]
    return ranks.gathered(w_RI, rows)


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
