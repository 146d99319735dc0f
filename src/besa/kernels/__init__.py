"""Operators that torch does not have in fast form: in C++ or plain torch on the CPU, in Triton on a GPU.

Every learning step passes over a weight twice, in `masked` and `binned`; they are the counterpart of the paper's custom
CUDA operator. `reference` computes the same in plain torch, and runs where there is no kernel. On the CPU, both give
the same bits.

Shape suffixes: O rows, I columns, K kept weights, B bins or columns of a block, R rate groups, G groups of columns,
T tokens.
"""

from __future__ import annotations

from torch import Tensor

from besa.kernels.operators import operator
from besa.quantization import Clipping

_masked = operator("masked(Tensor w, Tensor ranks, Tensor counts, Tensor(a!) out) -> ()", "masks")
_binned = operator("binned(Tensor gradient, Tensor w, Tensor ranks, Tensor bins, Tensor(a!) out) -> ()", "masks")
_spread = operator("spread(Tensor w, Tensor kept, Tensor(a!) out) -> ()", "masks")
_gathered = operator("gathered(Tensor w, Tensor x, Tensor(a!) out) -> ()", "masks")
_pruned_ranks = operator("pruned_ranks(Tensor alpha, Tensor width, Tensor share, float sparsity) -> Tensor", "rates")
_cheapest_counts = operator(
    "cheapest_counts(Tensor ideal, Tensor width, Tensor least, int total) -> Tensor", "apportioning"
)
_quantized = operator(
    "quantized(Tensor w, Tensor logits, Tensor low, Tensor high, int bits, bool symmetric, Tensor(a!) out) -> ()",
    "clipping",
)
_clipping_gradient = operator(
    "clipping_gradient(Tensor gradient, Tensor w, Tensor logits, Tensor low, Tensor high, int bits, bool symmetric)"
    " -> Tensor",
    "clipping",
)
_swept = operator("swept(Tensor(a!) block, Tensor kept, Tensor factor, Tensor(b!) error) -> ()", "sweep")
_add_squares = operator("add_squares(Tensor x, Tensor(a!) squares) -> ()", "statistics")
_histogram = operator("histogram(Tensor values, int bins) -> Tensor", "statistics")


def masked(w_OI: Tensor, ranks_OI: Tensor, counts_O: Tensor, out_OI: Tensor) -> None:
    """Write W ⊙ M to `out_OI`. The mask M prunes the `counts_O[o]` lowest ranks of row o.

    Args:
        w_OI: the weight; it and all other arguments are contiguous.
        ranks_OI: place of each weight in the pruning order of its row, int16 or int32.
        counts_O: number of ranks pruned in each row, int64.
        out_OI: like `w_OI`; it may be `w_OI`.
    """
    _masked(w_OI, ranks_OI, counts_O, out_OI)


def binned(gradient_OI: Tensor, w_OI: Tensor, ranks_OI: Tensor, bins_I: Tensor, out_OB: Tensor) -> None:
    """Write to `out_OB` the sums over each row of gradient ⊙ W, by the bin of each weight's rank.

    With the candidate pruning rates as bins, these sums give the gradient of beta (straight through eq. 4), without
    probabilities of the size of the mask.

    Args:
        gradient_OI: dL/d(W ⊙ M), in the dtype of `w_OI`; it and all other arguments are contiguous.
        w_OI: the weight.
        ranks_OI: as in `masked`.
        bins_I: bin of each rank, ascending, int16.
        out_OB: float32.
    """
    _binned(gradient_OI, w_OI, ranks_OI, bins_I, out_OB)


def spread(w_OI: Tensor, kept_K: Tensor, out_OI: Tensor) -> None:
    """Write the numbers `kept_K` to `out_OI` where W is not zero, row by row, and zeros elsewhere.

    Args:
        w_OI: the weight, whose zeros are its mask; it and all other arguments are contiguous.
        kept_K: float32, one for each non-zero of W; rounded to the nearest number of the dtype.
        out_OI: in the dtype of `w_OI`, another tensor.
    """
    _spread(w_OI, kept_K, out_OI)


def gathered(w_OI: Tensor, x_OI: Tensor, out_K: Tensor) -> None:
    """Write to `out_K` the numbers of X where W is not zero, row by row: the inverse of `spread`.

    Args:
        w_OI: as in `spread`.
        x_OI: in the dtype of `w_OI`; it may be `w_OI`.
        out_K: float32.
    """
    _gathered(w_OI, x_OI, out_K)


def pruned_ranks(alpha_R: Tensor, width_R: Tensor, share_R: Tensor, sparsity: float) -> Tensor:
    """Number of ranks pruned in a row (R,), int64, with which the masks meet the sparsity: ⌊(alpha + shift)·width⌋.

    One shift of all rates, clamped to [0, 1], is found by bisection: Σ share·(alpha + shift) is the sparsity. Products
    within 1e-3 below an integer count as that integer.

    Args:
        alpha_R: expected pruning rate of each group (eq. 3), float32; it and all other arguments are contiguous.
        width_R: weights in a row of each group, float64.
        share_R: share of each group in all weights, float32.
        sparsity: the target.
    """
    counts_R: Tensor = _pruned_ranks(alpha_R, width_R, share_R, sparsity)
    return counts_R


def cheapest_counts(ideal_R: Tensor, width_R: Tensor, least_R: Tensor, total: int) -> Tensor:
    """Integers (R,) whose sum is `total` or a few less: every row takes all steps that cost less than one common price.

    The step from n to n + 1 costs (2(n − ideal) + 1) / width. A bisection finds the highest price at which the numbers
    fit. Half a step less is taken, so that equal rows are equal in spite of the rounding of the last price.

    Args:
        ideal_R: where the cost of a row is least; it and all other tensors are float64 and contiguous.
        width_R: largest number of each row, positive.
        least_R: smallest number of each row.
        total: at least the sum of `least_R`, at most that of `width_R`.
    """
    counts_R: Tensor = _cheapest_counts(ideal_R, width_R, least_R, total)
    return counts_R


def quantized(clipping: Clipping, out_OI: Tensor) -> None:
    """Write Q(W) of eq. 7, with the present γ, to `out_OI` (contiguous, of any float dtype)."""
    _quantized(
        clipping.w_OI,
        clipping.logits_2OG,
        clipping.low_OG,
        clipping.high_OG,
        clipping.bits,
        clipping.symmetric,
        out_OI,
    )


def clipping_gradient(gradient_OI: Tensor, clipping: Clipping) -> Tensor:
    """The gradient of the logits of γ (2, O, G), float32, straight through the rounding of eq. 7.

    Args:
        gradient_OI: dL/dQ at the present γ, zero for pruned weights; contiguous.
        clipping: of the weight.
    """
    gradient_2OG: Tensor = _clipping_gradient(
        gradient_OI,
        clipping.w_OI,
        clipping.logits_2OG,
        clipping.low_OG,
        clipping.high_OG,
        clipping.bits,
        clipping.symmetric,
    )
    return gradient_2OG


def swept(block_OB: Tensor, kept_OB: Tensor, factor_BB: Tensor, error_OB: Tensor) -> None:
    """Prune a block of columns from left to right; each column's error changes the columns to its right (SparseGPT).

    Args:
        block_OB: float32 weights, changed in place; it and the others may be views of wider or transposed matrices.
        kept_OB: the mask, True = kept.
        factor_BB: the upper triangular factor of the inverse Hessian, at these columns.
        error_OB: receives the error of each column divided by the factor's diagonal, for the columns beyond the block.
    """
    _swept(block_OB, kept_OB, factor_BB, error_OB)


def add_squares(x_TI: Tensor, squares_I: Tensor) -> None:
    """Add Σ_t x² of some tokens `x_TI`, of any float dtype, to `squares_I` (float64); summed up in float32."""
    _add_squares(x_TI, squares_I)


def histogram(values: Tensor, bins: int) -> Tensor:
    """How often each of 0, …, `bins` − 1 occurs: (bins,), int64. The host does not wait for the device.

    Args:
        values: non-negative integers in any shape; larger ones are not counted.
        bins: number of bins.
    """
    counts: Tensor = _histogram(values, bins)
    return counts
