"""The layout against one written with loops, its way back to the bit, and what must not be loaded."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from besa.errors import BesaError
from besa.quantization import Quantized
from besa.quantization.minmax import codes, dequantized, extremes, grid
from besa.storage.formats import bitmask

SPARSITIES = [0, 0.3, 0.5, 0.9, 1]


@st.composite
def weights(draw, most=(9, 200)):
    """A float32 weight some of which is zero, in rows of differing rates."""
    shape = draw(st.integers(1, most[0])), draw(st.integers(1, most[1]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    rates_O1 = torch.tensor(draw(st.lists(st.sampled_from(SPARSITIES), min_size=shape[0], max_size=shape[0])))[:, None]
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) >= rates_O1)


@st.composite
def quantized(draw):
    """A quantised weight, with any number of bits and groups."""
    w_OI = draw(weights())
    groups = draw(st.sampled_from([n for n in (1, 2, 3, 4) if w_OI.shape[1] % n == 0]))
    bits, symmetric = draw(st.integers(2, 8)), draw(st.booleans())
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    steps = grid(*extremes(w_OI, groups), bits, symmetric)
    steps = replace(steps, step_OG=steps.step_OG.to(dtype).float().clamp_min(2.0**-14))
    return Quantized(codes(w_OI, steps).to(torch.uint8), steps, symmetric, dtype)


def kept(weight):
    """The number of weights that the masks keep."""
    return np.unpackbits(weight.masks_BCR.numpy().view(np.uint8)).sum()


def by_loops(w_OI, zero_OI, kind):
    """Masks and bytes of values in the order of the specification."""
    length, _ = bitmask.CHUNKS[kind]
    rows, columns = w_OI.shape
    masks, values = [], b""
    for band in range(0, rows, 4):
        for left in range(0, columns, length):
            for row in range(band, band + 4):
                inside = range(left, min(left + length, columns)) if row < rows else []
                kept = [i for i in inside if w_OI[row, i] != zero_OI[row, i]]
                masks.append(sum(1 << (i - left) for i in kept))
                if kind == "int4":
                    run = [int(w_OI[row, i]) for i in kept] + [0] * (len(kept) % 2)
                    values += bytes(low | high << 4 for low, high in zip(run[::2], run[1::2], strict=True))
                else:
                    values += b"".join(bytes(w_OI[row, i].reshape(1).view(torch.uint8).tolist()) for i in kept)
    return masks, values


@pytest.mark.parametrize("dtype", bitmask.FLOATS)
@given(w_OI=weights())
@settings(deadline=None, max_examples=40)
def test_floats_come_back_to_the_bit(dtype, w_OI):
    w_OI = w_OI.to(dtype)
    weight = bitmask.pack(w_OI)
    weight.check("it")
    assert torch.equal(weight.unpack().view(torch.uint8), (w_OI + 0).view(torch.uint8))  # -0 + 0 is 0
    assert kept(weight) == w_OI.count_nonzero()
    assert weight.dtype == dtype


@given(weight=quantized())
@settings(deadline=None, max_examples=80)
def test_codes_come_back_to_the_bit(weight):
    packed = bitmask.pack_codes(weight)
    packed.check("it")
    found = packed.unpack_codes()
    assert torch.equal(found.codes_OI, weight.codes_OI)
    assert torch.equal(found.grid.step_OG, weight.grid.step_OG)
    assert torch.equal(found.grid.zero_OG, weight.grid.zero_OG)
    assert (found.grid.bits, found.symmetric, found.dtype) == (weight.grid.bits, weight.symmetric, weight.dtype)
    expected_OI = dequantized(weight.codes_OI, weight.grid, weight.dtype)
    assert torch.equal(packed.unpack(), expected_OI)
    assert kept(packed) == expected_OI.count_nonzero()


@given(weight=quantized(), w_OI=weights(most=(6, 80)), dtype=st.sampled_from(bitmask.FLOATS))
@settings(deadline=None, max_examples=25)
def test_the_layout_is_as_specified(weight, w_OI, dtype):
    w_OI = w_OI.to(dtype)
    zeros_OG = weight.grid.zero_OG.to(torch.uint8)
    zeros_OI = zeros_OG.repeat_interleave(weight.codes_OI.shape[1] // zeros_OG.shape[1], dim=1)
    for packed, dense_OI, zero_OI in [
        (bitmask.pack(w_OI), w_OI, torch.zeros_like(w_OI)),
        (bitmask.pack_codes(weight), weight.codes_OI, zeros_OI),
    ]:
        masks, values = by_loops(dense_OI, zero_OI, packed.kind)
        unsigned = 2 ** (8 * packed.masks_BCR.element_size())
        assert [mask % unsigned for mask in packed.masks_BCR.flatten().tolist()] == masks
        assert bytes(packed.values.view(torch.uint8).tolist()) == values + bytes(64)
        assert packed.offsets[-1] == len(values)


def test_panels_without_a_code(monkeypatch):
    """Rows that are pruned whole, as many as a panel has."""
    monkeypatch.setattr(bitmask, "PANEL", 600)
    w_OI = torch.randn(70, 64)
    steps = grid(*extremes(w_OI, 1), 4, True)
    for pruned in (slice(0, 32), slice(32, 64), slice(32, 70), slice(0, 70)):
        codes_OI = codes(w_OI, steps).to(torch.uint8)
        codes_OI[pruned] = 8
        weight = Quantized(codes_OI, steps, True, torch.float32)
        packed = bitmask.pack_codes(weight)
        packed.check("it")
        assert torch.equal(packed.unpack_codes().codes_OI, weight.codes_OI)
        assert not packed.unpack()[pruned].any()


def test_panels_do_not_show(monkeypatch):
    w_OI = torch.randn(37, 50) * (torch.rand(37, 50) > 0.5)
    whole = bitmask.pack(w_OI)
    monkeypatch.setattr(bitmask, "PANEL", 600)
    parts = bitmask.pack(w_OI)
    for name in ("masks_BCR", "values", "offsets"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))
    parts.check("it")
    assert torch.equal(parts.unpack(), w_OI)
    assert torch.equal(parts.unpack_bands(slice(2, 10)), w_OI[8:])


def test_bytes_at_half_the_weights():
    """The limit of what a mask can save: b/2 + 1/8 bytes a weight, and less than 2 % for the rest."""
    generator = torch.Generator().manual_seed(0)
    w_OI = torch.randn(512, 1024, generator=generator)
    w_OI[torch.rand(w_OI.shape, generator=generator).argsort(dim=1) < 512] = 0
    for dtype in bitmask.FLOATS:
        packed, least = bitmask.pack(w_OI.to(dtype)), (dtype.itemsize / 2 + 1 / 8) * w_OI.numel()
        assert least < packed.nbytes < 1.02 * least


DAMAGES = {  # what a file may hold that looks like a weight
    "bits beyond the columns": lambda weight: {"shape": (weight.shape[0], weight.shape[1] - 1)},
    "more kept": lambda weight: {"masks_BCR": weight.masks_BCR | 3},
    "words": lambda weight: {"masks_BCR": weight.masks_BCR.int()},
    "bands": lambda weight: {"masks_BCR": weight.masks_BCR[1:]},
    "values": lambda weight: {"values": weight.values[:-1]},
    "dtype": lambda weight: {"values": weight.values.double()},
    "offsets": lambda weight: {"offsets": weight.offsets + 4},
    "columns": lambda weight: {"shape": (weight.shape[0], weight.shape[1] + 16)},
    "bits of no code": lambda weight: {"bits": 4},
    "steps of no code": lambda weight: {"scales_OG": torch.ones(weight.shape[0], 1)},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_refused(damage):
    w_OI = torch.randn(9, 30) * (torch.rand(9, 30) > 0.5)
    w_OI[:, -1] = 1
    weight = bitmask.pack(w_OI)
    with pytest.raises(BesaError, match="up_proj is damaged"):
        replace(weight, **damage(weight)).check("up_proj")


@pytest.mark.parametrize("change", ["groups", "rows", "zeros", "none", "bits"])
def test_grids_that_do_not_fit_are_refused(change):
    steps = grid(*extremes(torch.randn(5, 24), 2), 4, False)
    weight = bitmask.pack_codes(Quantized(torch.randint(16, (5, 24), dtype=torch.uint8), steps, False, torch.float32))
    weight.check("it")
    changes = {
        "groups": {"scales_OG": torch.ones(5, 7), "zeros_OG": torch.ones(5, 7, dtype=torch.uint8)},
        "rows": {"scales_OG": torch.ones(4, 2)},
        "zeros": {"zeros_OG": weight.zeros_OG[:, :1]},
        "none": {"scales_OG": None},
        "bits": {"bits": 9},
    }
    with pytest.raises(BesaError, match="damaged"):
        replace(weight, **changes[change]).check("it")


def test_other_dtypes_are_refused():
    with pytest.raises(BesaError, match="float64"):
        bitmask.pack(torch.ones(2, 2, dtype=torch.float64))
