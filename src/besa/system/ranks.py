"""The processes of a run, one for each device: who has which sequences and rows, and sums over all of them.

Every process (*rank*) runs the same program on its own sequences. Whatever decides something is the same on all ranks:
a sum over all of them, or rows that were gathered. A program of one process calls the same functions, which then do
nothing.

Shape suffixes: O rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from besa.errors import BesaError
from besa.storage.tensors import bytes_of

T = TypeVar("T")
CHUNK = 1 << 22  # weights at a time, to bound temporary memory
WIRED = ("cpu", "cuda")  # devices whose tensors torch.distributed sends; those of others go by way of the host


@dataclass
class _Group:
    """The processes that work together.

    Attributes:
        number: of this one.
        count: of all.
        here: of those on this machine.
        place: of this one among those on its machine.
        explain: is called when torch.distributed fails.
        waiting: this one waits for others.
        sent: bytes that this rank has sent, if sums and gatherings go round a ring.
    """

    number: int = 0
    count: int = 1
    here: int = 1
    place: int = 0
    explain: Callable[[RuntimeError], None] = lambda error: None
    waiting: bool = False
    sent: float = 0.0


_group = _Group()


def count() -> int:
    """Number of ranks; 1 in a program of one process."""
    return _group.count


def number() -> int:
    """Number of this rank, from 0. Rank 0 writes files and shows progress."""
    return _group.number


def here() -> int:
    """Number of ranks on this machine, which share its memory."""
    return _group.here


def is_first() -> bool:
    """Whether this is rank 0."""
    return _group.number == 0


def place() -> int:
    """Number of this rank among those on its machine, from 0: that of its GPU."""
    return _group.place


def waiting() -> bool:
    """Whether this rank is waiting for others."""
    return _group.waiting


@contextmanager
def together(
    number: int,
    count: int,
    here: int | None = None,
    place: int = 0,
    explain: Callable[[RuntimeError], None] = lambda error: None,
) -> Iterator[None]:
    """While open, this process is a rank of torch.distributed's default group.

    Args:
        number: of this rank.
        count: of all ranks.
        here: of those on this machine; all by default.
        place: of this rank among those on its machine.
        explain: is called when torch.distributed fails; it may raise a better error.
    """
    global _group
    before, _group = _group, _Group(number, count, count if here is None else here, place, explain)
    try:
        yield
    finally:
        _group = before


@contextmanager
def alone() -> Iterator[None]:
    """While open, this process works without the other ranks, beside those on this machine."""
    with together(0, 1, here(), place()):
        yield


@contextmanager
def with_others() -> Iterator[None]:
    """While open, this rank waits for what the others send."""
    _group.waiting = True
    try:
        yield
    except RuntimeError as error:
        _group.explain(error)
        raise
    finally:
        _group.waiting = False


@dataclass(frozen=True)
class Share:
    """The sequences of a set that one rank has: those from `first` up to `end`, of `total`."""

    first: int
    end: int
    total: int

    @classmethod
    def whole(cls, total: int) -> Share:
        """All sequences."""
        return cls(0, total, total)

    @classmethod
    def of(cls, total: int, batch: int = 1) -> Share:
        """The share of this rank. Shares are whole batches, so that every batch has the same sequences on any rank.

        Args:
            total: number of sequences.
            batch: sequences in a forward pass.
        """
        batches = -(-total // batch)
        first, end = (min(total, batch * (batches * rank // count())) for rank in (number(), number() + 1))
        return cls(first, end, total)

    def __len__(self) -> int:
        return self.end - self.first

    @property
    def places(self) -> slice:
        """The places of the sequences in the set."""
        return slice(self.first, self.end)

    def every(self, step: int) -> range:
        """The places in the set, of those of the share that are multiples of `step`."""
        return range(-(-self.first // step) * step, self.end, step)

    def own(self, places: Sequence[int]) -> list[int]:
        """The positions within the share of those of the places that it has."""
        return [place - self.first for place in places if self.first <= place < self.end]


def total(tensor: Tensor) -> Tensor:
    """The tensor, with its sum over all ranks in place of its numbers; sums are in its own dtype.

    A sum of float32 numbers in float64 is exact unless some are more than 2²⁹ times as large as others. Such sums, once
    rounded to float32, therefore do not depend on the number of ranks.
    """
    if count() > 1:
        wired = _wired(tensor)
        with with_others():
            dist.all_reduce(wired)
        if wired is not tensor:
            tensor.copy_(wired)
        _group.sent += 2 * (count() - 1) / count() * tensor.nbytes
    return tensor


def rows(length: int) -> slice:
    """The rows that this rank computes, of `length` rows that all share."""
    return slice(*(length * rank // count() for rank in (number(), number() + 1)))


def by_rows(function: Callable[[slice], Tensor], length: int) -> Tensor:
    """A tensor (length, …) of which every rank computes its `rows`.

    Args:
        function: computes these rows of it.
        length: number of rows of all ranks.
    """
    return gathered(function(rows(length)), length)


def gathered(part: Tensor, length: int) -> Tensor:
    """All `length` rows (length, …), of which every rank has its `rows`."""
    if count() == 1:
        return part
    ends = [length * rank // count() for rank in range(count() + 1)]
    return torch.cat(_all_parts(part, [end - start for start, end in pairwise(ends)]))


def all_of(thing: T) -> list[T]:
    """A small object of every rank, in their order; it has the types of JSON."""
    if count() == 1:
        return [thing]
    bytes_B = torch.frombuffer(bytearray(json.dumps(thing).encode()), dtype=torch.uint8)
    lengths = torch.cat(_all_parts(torch.tensor([len(bytes_B)]), [1] * count())).tolist()
    return [json.loads(bytes(part_B.tolist())) for part_B in _all_parts(bytes_B, lengths)]


def from_first(thing: T) -> T:
    """The small object of rank 0, on every rank; it has the types of JSON."""
    return all_of(thing if is_first() else None)[0]  # type: ignore[return-value]


def _all_parts(part: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The tensors (lengths[rank], …) of all ranks, of any dtype."""
    padded = part.new_zeros(max(lengths), *part.shape[1:])
    padded[: len(part)] = part
    padded = _wired(padded).view(torch.uint8)
    parts = [torch.empty_like(padded) for _ in lengths]
    with with_others():
        dist.all_gather(parts, padded)
    _group.sent += (count() - 1) * padded.nbytes
    return [each.view(part.dtype)[:length].to(part.device) for each, length in zip(parts, lengths, strict=True)]


def tensors_from_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of rank 0, on the host, on every rank; what the others give is ignored."""
    if count() == 1:
        return dict(tensors)
    kinds: dict[str, Any] = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)} for name, tensor in tensors.items()
    }
    kinds, received = from_first(kinds), {}
    for name, kind in kinds.items():
        own = tensors[name].cpu().contiguous() if is_first() else _empty(**kind)
        with with_others():
            dist.broadcast(bytes_of(own), 0)
        _group.sent += (count() - 1) / count() * own.nbytes
        received[name] = own
    return received


def wait() -> None:
    """Wait until all ranks have come here."""
    all_of(None)


def check_same(name: str, tensors: Sequence[Tensor]) -> None:
    """Check that all ranks have decided alike.

    Args:
        name: of what was decided, for the error message.
        tensors: matrices, to the bit.

    Raises:
        BesaError: the tensors of two ranks differ.
    """
    if count() == 1:
        return
    digests = all_of([_digest(tensor) for tensor in tensors])
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise BesaError(
            f"Ranks 0 and {other} have pruned {name} differently, because their machines round differently: use ranks "
            "of one kind, with the same libraries and the same number of threads."
        )


def sent() -> int:
    """Bytes that this rank has sent to others until now, if sums and gatherings go round a ring."""
    return round(_group.sent)


def _empty(shape: list[int], dtype: str) -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))


def _wired(tensor: Tensor) -> Tensor:
    """The tensor where and as torch.distributed can send it: NCCL takes contiguous ones only."""
    return (tensor if tensor.device.type in WIRED else tensor.cpu()).contiguous()


def _digest(tensor_OI: Tensor) -> int:
    """A number that any change of the bits almost surely changes."""
    bits_OI = tensor_OI.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor_OI.element_size()])
    rows, width = bits_OI.shape
    factors = torch.arange(1, 2 * max(rows, width), 2, device=bits_OI.device) * 0x1E3779B97F4A7C15  # odd; they wrap
    step = max(1, CHUNK // width)
    sums_O = torch.cat([(part_OI * factors[:width]).sum(dim=1) for part_OI in bits_OI.split(step)])
    return int((sums_O * factors[:rows]).sum())
