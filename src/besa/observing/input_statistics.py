"""Statistics of a matrix's input, for importance and reconstruction: channel norms and, if needed, the Gram matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from besa import kernels
from besa.counting.precision import products_in, widest
from besa.errors import BesaError
from besa.models.activations import HiddenStates
from besa.models.blocks import Block
from besa.models.prunable import Prunable
from besa.models.transfers import fetched
from besa.models.units import Unit
from besa.observing.products import Products
from besa.system import ranks
from besa.system.ranks import Share

UNSEEN = [-1, 0]  # of a matrix that no token of a rank reached: number of its input, and tokens
HELD_OUT = 8  # whatever moves weights holds out one sequence in so many, to judge the result by
PANEL = 512  # rows of a Gram matrix at a time: they stay in a processor's cache until they are added up


@dataclass
class InputStatistics:
    """Sums over all calibration tokens x (I,) that reached one linear.

    Sums of a forward pass are rounded to float32 and then added up in the widest numbers of the device. They therefore
    do not depend on how passes are divided among ranks (`ranks.total`).

    Attributes:
        squares_I: Σ x², in the widest numbers of the device.
        gram_II: Σ x xᵀ of the tokens to solve for, float32; None if no method of the recipe needs it. Until it is
            settled, it is as wide as `squares_I` and has its upper half only, with the blocks on the diagonal.
        held_II: the same of the tokens that are held out.
        tokens: number of tokens, of both.
    """

    squares_I: Tensor
    gram_II: Tensor | None
    held_II: Tensor | None = None
    tokens: int = 0
    _reached: bool | None = field(default=None, repr=False)  # None: nobody has looked
    _inverses: dict[float, Tensor] = field(default_factory=dict, repr=False)  # by damping

    @classmethod
    def empty(cls, width: int, gram: bool, device: torch.device) -> InputStatistics:
        """Statistics of no tokens for inputs of `width` channels."""
        squares_I = torch.zeros(width, dtype=widest(device), device=device)
        gram_II, held_II = (squares_I.new_zeros(width, width) if gram else None for _ in range(2))
        return cls(squares_I, gram_II, held_II)

    def add(self, x_TI: Tensor, held_out: Sequence[bool] = (False,)) -> None:
        """Add tokens of a forward pass.

        Args:
            x_TI: the tokens, of any float dtype, in the order of the sequences.
            held_out: whether each sequence of the pass is held out. Where they differ, every token of the pass comes,
                and rows are told by their place.
        """
        self._inverses.clear()
        self._reached = None
        if self.gram_II is not None and self.held_II is not None:
            with products_in(x_TI.dtype):
                for rows, held in _runs(len(x_TI), held_out):
                    _add_products(x_TI[rows].float(), self.held_II if held else self.gram_II)
        squares_I = torch.zeros_like(self.squares_I)
        kernels.add_squares(x_TI, squares_I)
        self.squares_I += squares_I.float()
        self.tokens += x_TI.shape[0]

    @property
    def reached(self) -> bool:
        """Whether any token came. Tokens of zeros do not count: some experts get zeros for the tokens of others."""
        if self._reached is None:
            self._reached = bool(self.squares_I.any())
        return self._reached

    @property
    def dead_I(self) -> Tensor:
        """Which channels (I,) were zero in every token: their weights do nothing.

        None of an input that no token reached, as nothing is known of it.
        """
        return (self.squares_I == 0) & self.reached

    def hessian(self, damping: float) -> Tensor:
        """H = Σ x xᵀ (I, I) of all tokens, as SparseGPT has it.

        `damping` × the diagonal's mean is added to the diagonal, which is 1 for zero channels.
        """
        assert self.gram_II is not None and self.held_II is not None, "the recipe did not ask for the Gram matrix"
        hessian_II = (self.gram_II + self.held_II).float()
        diagonal_I = hessian_II.diagonal()
        diagonal_I.masked_fill_(diagonal_I == 0, 1.0)
        diagonal_I += damping * diagonal_I.mean()
        return hessian_II

    def inverse_hessian(self, damping: float) -> Tensor:
        """Inverse (I, I) of the damped Hessian, by Cholesky. It is kept, because linears with the same input share it.

        Raises:
            BesaError: the damped Hessian is not positive definite.
        """
        if damping not in self._inverses:
            self._inverses[damping] = inverted(self.hessian(damping))
        return self._inverses[damping]


def inverted(hessian_II: Tensor) -> Tensor:
    """The inverse (I, I) of a Hessian, by Cholesky.

    Raises:
        BesaError: it is not positive definite.
    """
    factor_II, failed = torch.linalg.cholesky_ex(hessian_II)
    if failed:
        raise BesaError(
            "The Hessian of a linear's inputs is not positive definite: use more calibration samples or a larger "
            "damping in the recipe."
        )
    return torch.cholesky_inverse(factor_II)


def _add_products(x_TI: Tensor, gram_II: Tensor) -> None:
    """Add Σ x xᵀ (I, I) to the upper half of a matrix, panel by panel."""
    for first in range(0, x_TI.shape[1], PANEL):
        gram_II[first : first + PANEL, first:] += x_TI[:, first : first + PANEL].T @ x_TI[:, first:]


def _whole(upper_II: Tensor) -> Tensor:
    """The symmetric matrix (I, I), float32, of which the upper half is there."""
    gram_II = upper_II.float()
    for first in range(0, len(gram_II), PANEL):
        end = first + PANEL
        on_diagonal = gram_II[first:end, first:end]
        on_diagonal.copy_(on_diagonal.triu() + on_diagonal.triu(1).T)
        gram_II[end:, first:end] = gram_II[first:end, end:].T
    return gram_II


def _runs(tokens: int, held_out: Sequence[bool]) -> Iterator[tuple[slice, bool]]:
    """The rows of consecutive sequences that are held out, or that are not."""
    sequences, end = len(held_out), 0
    for held, run in groupby(held_out):
        start, end = end, end + len(list(run))
        yield slice(tokens * start // sequences, tokens * end // sequences), held


def _passes(held_out_N: Sequence[bool], batch: int, *, apart: bool) -> Iterator[slice]:
    """The sequences of each forward pass; if `apart`, those that are held out are in none with others."""
    for start in range(0, len(held_out_N), batch):
        own = held_out_N[start : start + batch]
        runs = [len(list(run)) for _, run in groupby(own)] if apart else [len(own)]
        for size in runs:
            yield slice(start, start + size)
            start += size


def settle(statistics: dict[str, InputStatistics]) -> None:
    """Finish the sums of a pass, by full name: over all ranks, and with one look at which of them any token reached."""
    if ranks.count() > 1:
        _add_up(statistics)
    distinct = list({id(one): one for one in statistics.values()}.values())
    if not distinct:
        return
    reached = torch.stack([one.squares_I.any() for one in distinct]).tolist()
    for one, came in zip(distinct, reached, strict=True):
        one._reached = came
        if one.gram_II is not None and one.held_II is not None:
            one.gram_II, one.held_II = _whole(one.gram_II), _whole(one.held_II)


def _add_up(statistics: dict[str, InputStatistics]) -> None:
    """Add up the sums of all ranks. An expert may have been reached on some ranks only, and shares an input there."""
    inputs: dict[int, int] = {}
    seen: list[dict[str, list[int]]] = ranks.all_of(
        {name: [inputs.setdefault(id(one), len(inputs)), one.tokens] for name, one in statistics.items() if one.tokens}
    )
    sharing: dict[tuple[int, ...], list[str]] = {}
    for name in sorted(set().union(*seen)):
        sharing.setdefault(tuple(of_rank.get(name, UNSEEN)[0] for of_rank in seen), []).append(name)
    for names in sharing.values():
        one = statistics[names[0]]
        one.tokens = sum(of_rank.get(names[0], UNSEEN)[1] for of_rank in seen)
        for sums in (one.squares_I, one.gram_II, one.held_II):
            if sums is not None:
                ranks.total(sums)
        statistics.update(dict.fromkeys(names, one))


@contextmanager
def collect(block: nn.Module, prunables: Mapping[str, Prunable], gram: bool) -> Iterator[dict[str, InputStatistics]]:
    """While open, gather the input statistics of each of `prunables` from every forward pass through `block`.

    Matrices with the same input tensor (q, k and v; gate and up) share one object, so it is computed once. Matrices
    that no token reached (experts that were not chosen) have statistics of zero tokens at the end.
    """
    sums = _Sums(gram)
    with Products(block, prunables, sums.add):
        yield sums.statistics
    sums.fill_up(block, prunables)
    settle(sums.statistics)


@torch.no_grad()
def look(
    unit: Unit, x_NTC: HiddenStates, batch: int, gram: bool, share: Share, every: int = 1
) -> dict[str, InputStatistics]:
    """The input statistics of all matrices of a unit, by full name; its outputs are not needed.

    If every matrix sees every token once in the first pass, later passes stop before the last matmul. The sequences at
    multiples of `HELD_OUT` are held out from what weights are solved for; a single sequence serves as both. If experts
    share the tokens, these sequences have passes of their own, as nothing tells the sequence of an expert's token.

    Args:
        unit: runs with its own weights.
        x_NTC: its inputs.
        batch: sequences in a forward pass.
        gram: whether to sum up Gram matrices.
        share: the sequences of the inputs, which are those of this rank.
        every: one sequence in so many is looked at.
    """
    routed = any(prunable.routed for prunable in unit.prunables.values())
    if every == 1:
        held_out_N = [(share.first + place) % HELD_OUT == 0 for place in range(len(x_NTC))]
        passes = list(_passes(held_out_N, batch, apart=gram and routed))
    else:  # by themselves, so that sums do not depend on how ranks share the sequences
        passes = [slice(place, place + 1) for place in share.own(share.every(every))]
    sums = [_Sums(gram) for _ in unit.blocks]
    final: str | None = None

    def add(name: str, x: Tensor) -> None:
        sums[-1].add(name, x)
        if name == final:
            raise _Enough

    with ExitStack() as stack:
        for block, receive in zip(unit.blocks, [*(block_sums.add for block_sums in sums[:-1]), add], strict=True):
            stack.enter_context(Products(block.module, block.prunables, receive))
        for one_pass in passes:
            batch_NTC = x_NTC[one_pass]
            held_out = [(share.first + one_pass.start + at) % HELD_OUT == 0 for at in range(len(batch_NTC))]
            for block_sums in sums:
                block_sums.held_out = held_out
            with suppress(_Enough):
                unit(fetched(batch_NTC, unit.device))
            if one_pass is passes[0] and sums[-1].saw_all_once(
                unit.blocks[-1], batch_NTC.shape[0] * batch_NTC.shape[1]
            ):
                final = list(sums[-1].statistics)[-1]
    for block, block_sums in zip(unit.blocks, sums, strict=True):
        block_sums.fill_up(block.module, block.prunables)
    found = {name: statistics for block_sums in sums for name, statistics in block_sums.statistics.items()}
    settle(found)
    if share.total == 1:
        for one in found.values():
            one.gram_II = one.held_II
    return found


class _Enough(Exception):  # noqa: N818 - not an error
    """All inputs of a pass are known: the rest of it is not needed."""


class _Sums:
    """Statistics that grow with the input of every product.

    Args:
        gram: whether to sum up Gram matrices.

    Attributes:
        statistics: by name of the matrix.
        held_out: whether each sequence of the present pass is held out.
    """

    def __init__(self, gram: bool) -> None:
        self.statistics: dict[str, InputStatistics] = {}
        self.held_out = [False]
        self._gram = gram
        self._last: tuple[Tensor, InputStatistics, set[str]] | None = None  # input, statistics, names of its matrices

    def add(self, name: str, x: Tensor) -> None:
        """Add an input (..., I) of the matrix `name`."""
        if self._last is not None and x is self._last[0] and name not in self._last[2]:
            self._last[2].add(name)
            if self.statistics.setdefault(name, self._last[1]) is self._last[1]:
                return
        if name not in self.statistics:
            self.statistics[name] = InputStatistics.empty(x.shape[-1], self._gram, x.device)
        self.statistics[name].add(x.detach().reshape(-1, x.shape[-1]), self.held_out)
        self._last = (x, self.statistics[name], {name})

    def saw_all_once(self, block: Block, tokens: int) -> bool:
        """Whether every matrix of the block has seen exactly so many tokens."""
        return len(self.statistics) == len(block.prunables) and all(
            statistics.tokens == tokens for statistics in self.statistics.values()
        )

    def fill_up(self, block: nn.Module, prunables: Mapping[str, Prunable]) -> None:
        """Give matrices that no token reached statistics of no tokens."""
        parameters = dict(block.named_parameters())
        for name, prunable in prunables.items():
            if name not in self.statistics:
                device = parameters[prunable.parameter].device
                self.statistics[name] = InputStatistics.empty(prunable.columns, self._gram, device)
