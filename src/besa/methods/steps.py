"""Learning steps on several sequences: which sequences a step has, and the mean of what they give.

Shape suffixes: V all numbers of several tensors, O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from besa.counting.precision import widest
from besa.observing.input_statistics import HELD_OUT
from besa.system import ranks


def one_pass(places: Sequence[int], batch: int, generator: torch.Generator) -> list[list[int]]:
    """The sequences of each step of a pass over the calibration set, in random order.

    The set is cut into `batch` parts. A step has one sequence of each, so that ranks with equal shares have equal work.

    Args:
        places: of the sequences in the set.
        batch: sequences of a step; the last step has fewer if they do not divide the set.
        generator: of the order.
    """
    ends = [len(places) * part // batch for part in range(batch + 1)]
    parts = [places[start:end] for start, end in pairwise(ends)]
    orders = [[part[at] for at in torch.randperm(len(part), generator=generator).tolist()] for part in parts]
    longest = max(len(order) for order in orders)
    return [[order[step] for order in orders if step < len(order)] for step in range(longest)]


class Mean:
    """The mean of some tensors over the sequences of a step, which one rank or several compute.

    Sums of several sequences are as wide as the device computes, so that they do not depend on who computes what
    (`ranks.total`). The mean of one sequence is what its rank has added.

    Args:
        sequences: of the step, over all ranks.
    """

    def __init__(self, sequences: int) -> None:
        self._sequences = sequences
        self._sum_V: Tensor | None = None

    def _dtype(self, device: torch.device) -> torch.dtype:
        return widest(device) if self._sequences > 1 else torch.float32

    @property
    def _trivial(self) -> bool:
        return self._sequences == ranks.count() == 1

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Add what one sequence gave, float32."""
        if self._trivial:
            return
        flat_V = torch.cat([tensor.flatten() for tensor in tensors]).to(self._dtype(tensors[0].device))
        self._sum_V = flat_V if self._sum_V is None else self._sum_V.add_(flat_V)

    def into(self, tensors: Sequence[Tensor]) -> None:
        """Write the mean into tensors of the same shapes."""
        if self._trivial:
            return
        sizes = [tensor.numel() for tensor in tensors]
        if self._sum_V is None:  # no sequence of the step is on this rank
            self._sum_V = tensors[0].new_zeros(sum(sizes), dtype=self._dtype(tensors[0].device))
        mean_V = ranks.total(self._sum_V) / self._sequences
        for tensor, part in zip(tensors, mean_V.split(sizes), strict=True):
            tensor.copy_(part.view_as(tensor))


def split(samples: int, epochs: int = 1) -> tuple[list[int], list[int]]:
    """Positions of the sequences to hold out and to learn from; a single sequence serves as both.

    Args:
        samples: number of sequences.
        epochs: that have sequences of their own; as many are held out as if there were one.
    """
    every = 1 + (HELD_OUT - 1) * epochs
    held = list(range(0, samples, every))
    return held, [place for place in range(samples) if place % every] or held


def average(leaves: Iterable[Tensor], sequences: int) -> None:
    """Divide the summed gradients of a step by the number of its sequences on all ranks.

    A leaf that no token of any sequence reached has none, and stays as it is. Those of experts in a stack have zeros,
    and go on by their momentum.
    """
    leaves = list(leaves)
    if ranks.count() > 1:
        reached = ranks.total(torch.tensor([leaf.grad is not None for leaf in leaves], dtype=torch.int64)).tolist()
        for leaf, on_ranks in zip(leaves, reached, strict=True):
            if on_ranks:
                leaf.grad = ranks.total(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    if sequences > 1:
        for leaf in leaves:
            if leaf.grad is not None:
                leaf.grad /= sequences


def root_mean_square(w_OI: Tensor) -> Tensor:
    """The root mean square (scalar) of the weights that are not zero."""
    w_OI = w_OI.detach()
    return (w_OI.square().sum() / (w_OI != 0).sum().clamp_min(1)).sqrt()
