"""The two passes over a weight in every learning step, each as one kernel: in C++ on the CPU, in Triton on a GPU.

They are the counterpart of the paper's custom CUDA operator. `reference` computes the same in plain torch and runs if
there is no kernel. On the CPU, both give the same bits.

Shape suffixes: O rows, I columns, B bins.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from besa.kernels import native, reference


def masked(w_OI: Tensor, ranks_OI: Tensor, counts_O: Tensor, out_OI: Tensor) -> None:
    """Write W ⊙ M to `out_OI`. The mask M prunes the `counts_O[o]` lowest ranks of row o.

    Args:
        w_OI: the weight; it and all other arguments are contiguous.
        ranks_OI: place of each weight in the pruning order of its row, int16 or int32.
        counts_O: number of ranks pruned in each row, int64.
        out_OI: like `w_OI`.
    """
    _kernels_for(w_OI).masked(w_OI, ranks_OI, counts_O, out_OI)


def binned(gradient_OI: Tensor, w_OI: Tensor, ranks_OI: Tensor, bins_I: Tensor, out_OB: Tensor) -> None:
    """Write to `out_OB` the sums over each row of gradient ⊙ W, by the bin of each weight's rank.

    With the candidate pruning rates as bins, these sums give the gradient of beta (straight through eq. 4), without
    probabilities of the size of the mask and without scattering.

    Args:
        gradient_OI: dL/d(W ⊙ M), in the dtype of `w_OI`; it and all other arguments are contiguous.
        w_OI: the weight.
        ranks_OI: as in `masked`.
        bins_I: bin of each rank, int16.
        out_OB: float32.
    """
    _kernels_for(w_OI).binned(gradient_OI, w_OI, ranks_OI, bins_I, out_OB)


def _kernels_for(w_OI: Tensor) -> ModuleType:
    """The module whose `masked` and `binned` can compute with a weight."""
    if w_OI.is_cuda:
        from besa.kernels.gpu import masks as gpu

        return masks
    return native if native.serves(w_OI) else reference
