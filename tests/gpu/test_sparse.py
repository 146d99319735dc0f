"""Sparse weights on the device: unpacked to the bit, and multiplied within the rounding that is stated."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

from besa.kernels import sparse
from besa.storage.formats import bitmask
from tests.sparse_weights import codes_weight, half_pruned, row_of_x

KINDS = ["float32", "bfloat16", "float16", "int8", "int4"]
SHAPES = [(1, 1), (6, 70), (19, 577), (512, 4096), (130, 11008), (5, 28672)]


def weight_of(kind, rows, columns, dtype=torch.bfloat16):
    if not kind.startswith("int"):
        return bitmask.pack(half_pruned(rows, columns).to(getattr(torch, kind)))
    groups = columns // 128 if columns % 128 == 0 and kind == "int4" else 1
    weight = codes_weight(rows, columns, groups, int(kind[3:]), symmetric=kind == "int8")
    return replace(weight, scales_OG=weight.scales_OG.to(dtype))


def moved(weight, device):
    names = ("masks_BCR", "values", "offsets", "scales_OG", "zeros_OG")
    return replace(weight, **{name: t.to(device) for name in names if (t := getattr(weight, name)) is not None})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products(device, waits, kind, shape):
    weight = weight_of(kind, *shape)
    there, dense_OI = moved(weight, device), weight.unpack()
    assert torch.equal(sparse.unpacked(there).cpu(), dense_OI)
    for batch in (1, 2, 8, 16, 17, 100):
        x_NI = row_of_x(weight, batch, spread=1)
        x_there_NI = x_NI.to(device)
        with waits() as found:
            y_NO = sparse.multiplied(x_there_NI, there)
        assert found == []
        exact_NO = linear(x_NI.double(), dense_OI.double())
        size_NO = linear(x_NI.double().abs(), dense_OI.double().abs())
        bound_NO = (shape[1] / 8 + 16) * 2**-22 * size_NO + 2 * torch.finfo(weight.dtype).eps * exact_NO.abs()
        if device.type == "cpu" and kind.startswith("int"):
            bound_NO = bound_NO + 2**-5 * size_NO  # codes are not rounded there, and x is
        assert y_NO.dtype == weight.dtype
        assert ((y_NO.cpu().double() - exact_NO).abs() <= bound_NO + 1e-6).all()


@pytest.mark.parametrize("group", [12, 16, 32, 64])
def test_groups_within_a_word(device, group):
    for bits, dtype in ((3, torch.float32), (4, torch.bfloat16), (5, torch.float16)):
        weight = codes_weight(13, 960, 960 // group, bits, symmetric=False)
        weight = replace(weight, scales_OG=weight.scales_OG.to(dtype))
        assert torch.equal(sparse.unpacked(moved(weight, device)).cpu(), weight.unpack())
