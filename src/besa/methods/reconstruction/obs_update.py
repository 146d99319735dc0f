"""SparseGPT: prune column by column; the columns to the right compensate (Frantar & Alistarh, 2023).

Shape suffixes: O rows (output channels), I columns (input channels), B columns of the present block of columns.
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
from besa.methods.reconstruction.written import written
from besa.observing.input_statistics import InputStatistics


class OBSUpdate(Rebuilder):
    """Optimal-brain-surgeon update of the kept weights, left to right in blocks of columns.

    With an *adaptive* mask, each block of columns chooses its zeros by w²/[H⁻¹]ⱼⱼ of the updated weights. The number of
    zeros stays the same for the linear, but not for each row. With a *fixed* mask, the zeros are the lowest ranks of
    each row, as the allocation chose them.
    """

    method: Literal["obs"] = "obs"
    columns: int = Field(default=128, ge=1, description="columns pruned before the columns to the right are updated")
    damping: float = Field(default=0.01, gt=0, description="added to the Hessian's diagonal, as a share of its mean")
    mask: Literal["adaptive", "fixed"] = "adaptive"
    solver_bytes: ClassVar[int] = 12

    @property
    def keeps_mask(self) -> bool:
        """Whether the mask is fixed."""
        return self.mask == "fixed"

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
        kept_OI = hard_mask(ranks_OI, counts_O) if self.mask == "fixed" else None
        factor_II = inverse_factor(statistics, self.damping)
        dense_OI = w_OI.float()
        columns = self.columns if group is None else group
        rebuilt_OI = sweep(
            dense_OI, dense_OI == 0, factor_II, columns, counts_O.sum(), kept_OI, per_row=group is not None
        )
        return written(rebuilt_OI, rebuilt_OI != 0, w_OI.dtype)


def inverse_factor(statistics: InputStatistics, damping: float) -> Tensor:
    """Upper triangular U (I, I) with H⁻¹ = Uᵀ U; row j over U_jj is the effect of removing weight j on later ones.

    Raises:
        BesaError: the inverse of the damped Hessian is not positive definite.
    """
    upper_II: Tensor
    upper_II, failed = torch.linalg.cholesky_ex(statistics.inverse_hessian(damping), upper=True)
    if failed:
        raise BesaError(
            f"The inverse Hessian of a linear's inputs is not positive definite at damping {damping:g}: "
            "use more calibration samples or a larger damping in the recipe."
        )
    return upper_II


def sweep(
    w_OI: Tensor,
    zero_OI: Tensor,
    factor_II: Tensor,
    columns: int,
    zeros: Tensor,
    kept_OI: Tensor | None = None,
    per_row: bool = False,
) -> Tensor:
    """Prune weights from left to right, and update the columns to the right after each; returns the weight (O, I).

    Args:
        w_OI: float32 weight, not changed.
        zero_OI: weights that are zero already; they are pruned first.
        factor_II: `inverse_factor` of the input's Hessian.
        columns: width of a block; the blocks share the zeros in proportion to their width.
        zeros: how many weights to prune (scalar); unused with a fixed mask.
        kept_OI: the fixed mask; None to choose it block by block.
        per_row: whether every row of a block loses the same number, as n:m patterns need.
    """
    w_OI = w_OI.clone()
    rows, width = w_OI.shape
    starts = range(0, width, columns)
    sizes = [min(columns, width - start) for start in starts]
    shares = [0] * len(sizes) if kept_OI is not None else _shares(zero_OI, sizes, zeros)
    for start, size, share in zip(starts, sizes, shares, strict=True):
        end = start + size
        block_OB, factor_BB = w_OI[:, start:end], factor_II[start:end, start:end]  # a view: updated in place
        if kept_OI is None:
            prunable_OB = block_OB.masked_fill(zero_OI[:, start:end], 0)
            score_OB = prunable_OB.square() / factor_BB.diagonal().square()
            shape = (rows, size) if per_row else (1, rows * size)
            order_OB = rank(score_OB.reshape(shape), prunable_OB.reshape(shape)).reshape(rows, size)
            kept_OB = order_OB >= (share // rows if per_row else share)
        else:
            kept_OB = kept_OI[:, start:end]
        error_OB = torch.empty_like(block_OB)
        kernels.swept(block_OB, kept_OB, factor_BB, error_OB)
        w_OI[:, end:] -= error_OB @ factor_II[start:end, end:]
    return w_OI


def _shares(zero_OI: Tensor, sizes: list[int], zeros: Tensor) -> list[int]:
    """How many of the zeros each block of columns gets. The host waits for the device once."""
    total, *present = torch.cat([zeros.reshape(1), zero_OI.sum(dim=0)]).tolist()
    present_of_block = torch.stack([part.sum() for part in torch.tensor(present).split(sizes)])
    widths, rate = zero_OI.shape[0] * torch.tensor(sizes), total / zero_OI.numel()
    shares: list[int] = apportion(torch.full((len(sizes),), rate), widths, total, present_of_block).tolist()
    return shares
