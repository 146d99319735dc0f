"""Passes over a weight that a learning step repeats, each in one go: in C++ on the CPU, in Triton on a GPU.

The counterpart of the paper's custom CUDA operator. `reference` says in plain torch what they compute, and is used
where there is no kernel; on the CPU, both give the same bits.

Shape suffixes: O rows, I columns, B bins.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from besa.kernels import native, reference


def masked(w_OI: Tensor, ranks_OI: Tensor, counts_O: Tensor, out_OI: Tensor) -> None:
    """Write W ⊙ M to `out_OI`, where the mask prunes the `counts_O[o]` lowest ranks of row o.

    Args:
        w_OI: the weight, contiguous, as all arguments are.
        ranks_OI: place of each weight in the pruning order of its row, int16 or int32.
        counts_O: ranks pruned of each row, int64.
        out_OI: like `w_OI`.
    """
    _kernels_for(w_OI).masked(w_OI, ranks_OI, counts_O, out_OI)


def binned(gradient_OI: Tensor, w_OI: Tensor, ranks_OI: Tensor, bins_I: Tensor, out_OB: Tensor) -> None:
    """Write to `out_OB` the sums over each row of gradient ⊙ W, by the bin of each weight's rank.

    With the candidate pruning rates as bins, this is all that the gradient of beta takes (straight through eq. 4): no
    probability of the size of the mask is made, nothing is scattered.

    Args:
        gradient_OI: dL/d(W ⊙ M), of the dtype of `w_OI`; contiguous, as all arguments are.
        w_OI: the weight.
        ranks_OI: as in `masked`.
        bins_I: bin of each rank, int16.
        out_OB: float32.
    """
    _kernels_for(w_OI).binned(gradient_OI, w_OI, ranks_OI, bins_I, out_OB)


def _kernels_for(w_OI: Tensor) -> ModuleType:
    """The module whose `masked` and `binned` suit a weight."""
    if w_OI.is_cuda:
        from besa.kernels import gpu

        return gpu
    return native if native.serves(w_OI) else reference
