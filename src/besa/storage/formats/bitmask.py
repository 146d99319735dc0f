"""One sparse weight in memory: one bit for every entry, and the kept values in the order in which kernels read them.

docs/formats.md specifies the layout. The kernels (`besa.kernels.sparse`) read it directly.

Shape suffixes: O rows, I columns, B bands of four rows, C chunks of a row, R the rows of a band, L the columns of a
chunk, G groups of a row that share a quantisation grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from besa.counting.precision import dtype_name
from besa.errors import BesaError
from besa.quantization import Grid, Quantized
from besa.quantization.minmax import dequantized
from besa.storage.weights import is_finite

ROWS = 4  # of a band
PADDING = 64  # bytes after the last value, so that a kernel may load whole vectors
PANEL = 1 << 22  # weights packed or unpacked at a time, to bound temporary memory
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# For each kind, columns of a chunk and dtype of its mask word. A chunk fills a vector of 64 bytes (nibbles as bytes).
CHUNKS = {
    "float32": (16, torch.int16),
    "bfloat16": (32, torch.int32),
    "float16": (32, torch.int32),
    "int8": (64, torch.int64),
    "int4": (64, torch.int64),
}


@dataclass(frozen=True, eq=False)
class Bitmask:
    """A weight (O, I) whose zeros take one bit each.

    A run is the kept values of one row in one chunk. Runs follow each other in the order band, chunk, row. Two codes of
    four bits share a byte within a run (the first code in the low half). Each run begins with a new byte.

    Attributes:
        shape: O and I.
        masks_BCR: one word for each run; bit l means that column C·L + l is kept. Bits beyond the last row or column
            are 0.
        values: of the kept weights, in the dtype of the weight; or their codes, as bytes. 64 bytes of zeros follow.
        offsets: where each band begins in `values`, and where the last one ends, in bytes (B + 1,), int64.
        scales_OG: step h of eq. 7, in the dtype of the weight; None if values are not codes.
        zeros_OG: code of zero, uint8; None if it is 2^(N−1) (symmetric), or if values are not codes.
        bits: N of a code; None if values are not codes.
    """

    shape: tuple[int, int]
    masks_BCR: Tensor
    values: Tensor
    offsets: Tensor
    scales_OG: Tensor | None = None
    zeros_OG: Tensor | None = None
    bits: int | None = None

    @property
    def kind(self) -> str:
        """The kind of a value: float32, bfloat16, float16, int8 (codes of 5 to 8 bits) or int4 (up to 4 bits)."""
        return _kind(self.values.dtype, self.bits)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense weight."""
        return self.values.dtype if self.scales_OG is None else self.scales_OG.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.masks_BCR, self.values, self.offsets, self.scales_OG, self.zeros_OG)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def unpack(self) -> Tensor:
        """The dense weight (O, I) that was packed, to the bit; see `pack` and `pack_codes`.

        An accelerator is not waited for; there, temporary memory is a few times that of the dense weight.
        """
        if self.values.device.type != "cpu":
            return self.unpack_bands(slice(0, len(self.masks_BCR)))
        return torch.cat([self.unpack_bands(panel) for panel in _panels(*self.shape)])

    def unpack_bands(self, bands: slice) -> Tensor:
        """The dense rows (O, I) of some bands."""
        return self.dequantize(self._expanded(bands), bands)

    def dequantize(self, expanded_OI: Tensor, bands: slice) -> Tensor:
        """The dense rows (O, I) of some bands from their values or codes, including those of pruned weights."""
        if self.scales_OG is None:
            return expanded_OI
        return dequantized(expanded_OI, self._grid(_rows(bands)), self.dtype)

    def unpack_codes(self) -> Quantized:
        """The codes and their grid; only for a weight packed by `pack_codes`."""
        codes_OI = torch.cat([self._expanded(panel) for panel in _panels(*self.shape)])
        return Quantized(codes_OI, self._grid(slice(None)), self.zeros_OG is None, self.dtype)

    def check(self, name: str) -> None:
        """Check every number once, so that kernels never read beyond the end and always unpack what was packed.

        Args:
            name: of the weight, for the message.

        Raises:
            BesaError: the tensors do not fit each other, or a number is out of range.
        """
        if not self._fits():
            flaw = "its masks and values do not fit"
        elif self.bits is None:
            flaw = "" if is_finite(self.values) else "its values hold NaN or infinity"
        else:
            flaw = self._flaw_of_codes(2**self.bits - 1)
        if flaw:
            raise BesaError(f"The sparse weight {name} is damaged: {flaw}; pack it again.")

    def _fits(self) -> bool:
        rows, columns = self.shape
        coded = self.bits is not None
        if self.values.dtype not in ((torch.uint8,) if coded else FLOATS) or self.bits not in (None, *range(2, 9)):
            return False
        if min(rows, columns) < 1 or self.values.dim() != 1:
            return False
        length, word = CHUNKS[self.kind]
        bands = -(-rows // ROWS)
        tensors: list[tuple[Tensor, tuple[int, ...], tuple[torch.dtype, ...]]]
        tensors = [(self.masks_BCR, (bands, -(-columns // length), ROWS), (word,))]
        tensors += [(self.offsets, (bands + 1,), (torch.int64,))]
        if coded != (self.scales_OG is not None) or (self.zeros_OG is not None and not coded):
            return False
        if self.scales_OG is not None:
            groups = self.scales_OG.shape[-1] if self.scales_OG.dim() else 0
            if groups == 0 or columns % groups:
                return False
            tensors += [(self.scales_OG, (rows, groups), FLOATS)]
            tensors += [(self.zeros_OG, (rows, groups), (torch.uint8,))] if self.zeros_OG is not None else []
        fit = all(tensor.shape == shape and tensor.dtype in dtypes for tensor, shape, dtypes in tensors)
        return fit and self._ends()

    def _flaw_of_codes(self, largest: int) -> str:
        """The flaw of the numbers of a weight of codes up to `largest`, in words; empty if there is none."""
        assert self.scales_OG is not None
        if not is_positive(self.scales_OG):
            return "its scales are not all positive numbers"
        if self.zeros_OG is not None and int(self.zeros_OG.max()) > largest:
            return f"its zero points are no codes of {self.bits} bits"
        halves = (self.values & 15, self.values >> 4) if self.kind == "int4" else (self.values,)
        if max(int(codes.max()) for codes in halves) > largest:
            return f"its values are no codes of {self.bits} bits"
        return ""

    def _ends(self) -> bool:
        """Whether every band ends where its masks say, and no mask has bits beyond the last row or column."""
        end = 0
        for panel in _panels(*self.shape):
            ends = _bytes(self.masks_BCR[panel], self.kind).sum(dim=(1, 2)).cumsum(0) + end
            if not torch.equal(ends, self.offsets[panel.start + 1 : panel.stop + 1]):
                return False
            end = int(ends[-1])
        rows, columns = (-self.shape[0] % ROWS, -self.shape[1] % CHUNKS[self.kind][0])
        below_CR, beyond_BRL = self.masks_BCR[-1, :, ROWS - rows :], _bits(self.masks_BCR[:, -1])[..., -columns:]
        clean = not bool(below_CR.any()) and not (columns and bool(beyond_BRL.any()))
        return clean and int(self.offsets[0]) == 0 and self.values.nbytes == end + PADDING

    def _expanded(self, bands: slice) -> Tensor:
        """Values or codes of the rows of some bands (O, I); pruned weights have zero or the code of zero."""
        kept_BCRL, values = _bits(self.masks_BCR[bands]), self._values(bands)
        if self.scales_OG is None:
            out_BCRL = values.new_zeros(kept_BCRL.shape)
        else:
            zeros_OI = self._grid(_rows(bands)).zeros_OI(self.shape[1], torch.uint8)
            out_BCRL = _chunked(zeros_OI, kept_BCRL.shape[-1]).contiguous()
        if self.kind == "int4" and len(values):
            halves = torch.stack([values & 15, values >> 4], dim=1).flatten()
            out_BCRL = torch.where(kept_BCRL, halves[_places(kept_BCRL)], out_BCRL)
        else:
            out_BCRL.masked_scatter_(kept_BCRL, values)
        return _dense(out_BCRL, self.shape, bands)

    def _values(self, bands: slice) -> Tensor:
        """The stored values of some bands; those of all bands with the bytes after them."""
        if bands == slice(0, len(self.masks_BCR)):
            return self.values
        begin, end = (self.offsets[[bands.start, bands.stop]] // self.values.element_size()).tolist()
        return self.values[begin:end]

    def _grid(self, rows: slice) -> Grid:
        assert self.scales_OG is not None and self.bits is not None
        step_OG = self.scales_OG[rows].float()
        if self.zeros_OG is None:
            return Grid(step_OG, torch.full_like(step_OG, 2.0 ** (self.bits - 1)), self.bits)
        return Grid(step_OG, self.zeros_OG[rows].float(), self.bits)


def is_positive(scales: Tensor) -> bool:
    """Whether scales are finite numbers above zero."""
    return is_finite(scales) and bool((scales > 0).all())


def pack(w_OI: Tensor) -> Bitmask:
    """A dense weight as a bitmask. Weights that are not zero are kept, to the bit; a negative zero becomes zero.

    Args:
        w_OI: float32, bfloat16 or float16.

    Raises:
        BesaError: the weight has another dtype.
    """
    if w_OI.dtype not in FLOATS:
        raise BesaError(f"A weight of {w_OI.dtype} cannot be packed: only float32, bfloat16 and float16 can.")
    rows, columns = w_OI.shape
    return Bitmask((rows, columns), *_streams(w_OI, w_OI != 0, None))


def pack_codes(weight: Quantized) -> Bitmask:
    """A quantised weight as a bitmask. Codes other than that of zero are kept."""
    rows, columns = weight.codes_OI.shape
    return Bitmask(
        (rows, columns),
        *_streams(weight.codes_OI, weight.codes_OI != weight.zeros_OI(), weight.grid.bits),
        scales_OG=weight.grid.step_OG.detach().to(weight.dtype),
        zeros_OG=None if weight.symmetric else weight.grid.zero_OG.to(torch.uint8),
        bits=weight.grid.bits,
    )


def _streams(w_OI: Tensor, kept_OI: Tensor, bits: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Masks, values and offsets of a weight, or of codes of `bits` bits."""
    kind = _kind(w_OI.dtype, bits)
    length, word = CHUNKS[kind]
    masks, values, sizes = [], [], []
    for bands in _panels(*w_OI.shape):
        w_BCRL, kept_BCRL = (_chunked(x_OI[_rows(bands)], length) for x_OI in (w_OI, kept_OI))
        masks.append(_words(kept_BCRL, word))
        values.append(_halves(w_BCRL, kept_BCRL) if kind == "int4" else _picked(w_BCRL, kept_BCRL))
        sizes.append(_bytes(masks[-1], kind).sum(dim=(1, 2)))
    padding = values[-1].new_zeros(PADDING // values[-1].element_size())
    return torch.cat(masks), torch.cat([*values, padding]), pad(torch.cat(sizes).cumsum(0), (1, 0))


def _kind(dtype: torch.dtype, bits: int | None) -> str:
    if bits is None:
        return dtype_name(dtype)
    return "int4" if bits <= 4 else "int8"


def _panels(rows: int, columns: int) -> list[slice]:
    """Slices of bands that are processed together."""
    bands = -(-rows // ROWS)
    return [slice(*ends) for ends in pairwise([*range(0, bands, max(1, PANEL // (ROWS * columns))), bands])]


def _rows(bands: slice) -> slice:
    return slice(ROWS * bands.start, ROWS * bands.stop)


def _chunked(w_OI: Tensor, length: int) -> Tensor:
    """(O, I) as (B, C, R, L); the last chunk and band are filled up with zeros."""
    rows, columns = w_OI.shape
    padded_OI = pad(w_OI, (0, -columns % length, 0, -rows % ROWS))
    return padded_OI.reshape(-1, ROWS, padded_OI.shape[1] // length, length).transpose(1, 2)


def _dense(x_BCRL: Tensor, shape: tuple[int, int], bands: slice) -> Tensor:
    """The rows of some bands of a weight (O, I), contiguous, without padding."""
    padded_OI = x_BCRL.transpose(1, 2).reshape(ROWS * len(x_BCRL), -1)
    return padded_OI[: shape[0] - ROWS * bands.start, : shape[1]].contiguous()


def _picked(w_BCRL: Tensor, kept_BCRL: Tensor) -> Tensor:
    """The kept values one after the other; numpy selects them several times as fast as torch."""
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[w_BCRL.itemsize]
    picked = w_BCRL.contiguous().view(word).cpu().numpy()[kept_BCRL.cpu().numpy()]
    return torch.from_numpy(picked).view(w_BCRL.dtype).to(w_BCRL.device)


def _words(kept_BCRL: Tensor, word: torch.dtype) -> Tensor:
    """Bits as words, the first bit the lowest."""
    places = torch.arange(8, dtype=torch.uint8, device=kept_BCRL.device)
    bits = kept_BCRL.to(torch.uint8).unflatten(-1, (-1, 8)) << places
    words: Tensor = bits.sum(dim=-1, dtype=torch.uint8).view(word)
    return words.squeeze(-1)


def _bits(masks_BCR: Tensor) -> Tensor:
    """Words as booleans (B, C, R, L)."""
    words = masks_BCR.unsqueeze(-1).view(torch.uint8)
    return ((words[..., None] >> torch.arange(8, dtype=torch.uint8, device=words.device)) & 1).flatten(-2).bool()


def _counts(masks_BCR: Tensor) -> Tensor:
    """Bits of each word (B, C, R), int64."""
    words = masks_BCR.cpu().numpy()
    counts = np.bitwise_count(words.view(f"u{words.itemsize}"))  # unsigned, because numpy counts absolute values
    return torch.from_numpy(counts).to(masks_BCR.device, torch.int64)


def _bytes(masks_BCR: Tensor, kind: str) -> Tensor:
    """Bytes of each run (B, C, R), int64."""
    counts_BCR = _counts(masks_BCR)
    return (counts_BCR + 1) // 2 if kind == "int4" else counts_BCR * (64 // CHUNKS[kind][0])


def _places(kept_BCRL: Tensor) -> Tensor:
    """Positions of the kept codes of four bits, in half bytes. Each run begins with a new byte.

    At the places of pruned weights, positions mean nothing; they are -1 at least.
    """
    counts_BCR = kept_BCRL.sum(dim=-1)
    sizes = (counts_BCR + counts_BCR % 2).flatten()
    begins_BCR = (sizes.cumsum(0) - sizes).view_as(counts_BCR)
    return begins_BCR[..., None] + kept_BCRL.cumsum(dim=-1, dtype=torch.int32) - 1


def _halves(codes_BCRL: Tensor, kept_BCRL: Tensor) -> Tensor:
    """The kept codes of four bits, two per byte."""
    counts = kept_BCRL.sum(dim=-1)
    halves = codes_BCRL.new_zeros(int((counts + counts % 2).sum()))
    halves[_places(kept_BCRL)[kept_BCRL]] = codes_BCRL[kept_BCRL]
    return halves[::2] | halves[1::2] << 4
