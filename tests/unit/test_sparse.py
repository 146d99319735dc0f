"""Products with sparse weights against dense ones in double precision, within the rounding that is stated."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from besa.kernels import sparse, sparse_native
from besa.quantization import Grid, Quantized
from besa.quantization.minmax import codes
from besa.storage.formats import bitmask
from tests.interpreter import repair
from tests.pretend import DEVICE, counts, reset
from tests.slowly import some_slow
from tests.sparse_weights import codes_weight, half_pruned, row_of_x
from tests.unit.test_bitmask import quantized, weights
from tests.unit.test_kernels import compiled

PATHS = sparse_native.paths()
BATCHES = [1, 2, 3, 4, 5, 9]


@pytest.fixture(scope="module")
def gpu():
    """The Triton kernels on CPU tensors (conftest.py says so to triton)."""
    pytest.importorskip("triton")
    from besa.kernels.gpu import sparse as gpu

    with pytest.MonkeyPatch.context() as patch:
        repair(patch)
        yield gpu


def assert_close(y_NO, x_NI, weight):
    """Whether y is x Wᵀ within what `sparse.multiplied` states."""
    x_NI = x_NI.double()
    if weight.bits is None:
        w_OI = weight.unpack().double()
        largest_OI = w_OI.abs()
        bound_NO = 0
    else:
        found = weight.unpack_codes()
        each = weight.shape[1] // found.grid.step_OG.shape[1]
        zero_OI, step_OI = (t.double().repeat_interleave(each, dim=1) for t in (found.grid.zero_OG, found.grid.step_OG))
        w_OI = (found.codes_OI.double() - zero_OI) * step_OI
        largest_OI = torch.maximum(found.codes_OI.double(), zero_OI) * step_OI
        size_NI = x_NI.abs()
        rounding_N1 = 2**-22 * size_NI.amax(dim=1, keepdim=True)
        if weight.dtype != torch.float32:
            rounding_N1 += 2**-12 * size_NI.mean(dim=1, keepdim=True)
        bound_NO = rounding_N1 * largest_OI.sum(dim=1)
    bound_NO = bound_NO + (weight.shape[1] / 8 + 16) * 2**-24 * linear(x_NI.abs(), largest_OI)
    assert y_NO.dtype == torch.float32
    assert ((y_NO.double() - linear(x_NI, w_OI)).abs() <= bound_NO).all()


@compiled
def test_this_machine_has_kernels():
    assert PATHS, "without kernels, the tests below test nothing"
    assert PATHS[-1] == "plain"


@pytest.mark.parametrize("path", PATHS)
@given(w_OI=weights(), dtype=st.sampled_from(bitmask.FLOATS), batch=st.sampled_from(BATCHES), threads=st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_products_with_floats(path, w_OI, dtype, batch, threads):
    weight = bitmask.pack(w_OI.to(dtype))
    x_NI = row_of_x(weight, batch)
    assert_close(with_threads(threads, sparse_native.multiply, x_NI.float(), weight, path), x_NI, weight)
    expanded_OI = with_threads(threads, sparse_native.expand, weight, slice(0, len(weight.masks_BCR)), path)
    assert torch.equal(expanded_OI, weight.unpack())


@pytest.mark.parametrize("path", PATHS)
@given(weight=quantized(), batch=st.sampled_from(BATCHES), threads=st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_products_with_codes(path, weight, batch, threads):
    packed = bitmask.pack_codes(weight)
    if not sparse_native.serves(packed):
        return
    x_NI = row_of_x(packed, batch)
    assert_close(with_threads(threads, sparse_native.multiply, x_NI.float(), packed, path), x_NI, packed)
    expanded_OI = with_threads(threads, sparse_native.expand, packed, slice(0, len(packed.masks_BCR)), path)
    assert torch.equal(expanded_OI, weight.codes_OI)


def with_threads(threads, work, *arguments):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return work(*arguments)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("columns", "group"), [(2176, 2176), (2176, 128), (1088, 64), (1056, 32), (1040, 16)])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (3, True), (8, False), (8, True)])
def test_groups_of_codes(path, columns, group, bits, symmetric):
    """Groups of more than a chunk and of less, also where they end within one."""
    weight = codes_weight(13, columns, columns // group, bits, symmetric)
    assert sparse_native.serves(weight)
    for batch in (1, 2, 5):
        x_NI = row_of_x(weight, batch, seed=batch)
        assert_close(sparse_native.multiply(x_NI, weight, path), x_NI, weight)
    expanded_OI = sparse_native.expand(weight, slice(1, 4), path)
    assert torch.equal(expanded_OI, weight.unpack_codes().codes_OI[4:])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", bitmask.FLOATS)
def test_rows_longer_than_a_tile(path, dtype):
    weight = bitmask.pack(half_pruned(6, 4500).to(dtype))
    for batch in (1, 7):
        x_NI = row_of_x(weight, batch)
        assert_close(sparse_native.multiply(x_NI.float(), weight, path), x_NI, weight)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_numbers_a_thousand_times_the_rest_leave_the_rest_its_places(path, dtype):
    """One column a row shows one number of x: the small ones must not drown in the rounding of the large ones."""
    w_OI = torch.zeros(200, 200).fill_diagonal_(127.0)
    steps = Grid(torch.ones(200, 1), torch.full((200, 1), 128.0), 8)
    weight = bitmask.pack_codes(Quantized(codes(w_OI, steps).to(torch.uint8), steps, True, dtype))
    x_NI = torch.linspace(1, 2, 400).reshape(2, 200)
    x_NI[0, [3, 130]] = torch.tensor([-3000.0, 1000.0])
    mean_N1 = x_NI.abs().mean(dim=1, keepdim=True) if dtype != torch.float32 else 0
    y_NI = sparse_native.multiply(x_NI, weight, path) / 127
    assert ((y_NI - x_NI).abs() <= 2**-12 * mean_N1 + 128 / 127 * 2**-22 * 3000).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("trouble", [torch.inf, torch.nan])
def test_what_is_no_number_shows(path, trouble):
    for weight in (bitmask.pack(half_pruned(5, 70)), codes_weight(5, 70, 1, 4, False)):
        x_NI = torch.ones(2, 70)
        x_NI[0, 3] = trouble
        y_NO = sparse_native.multiply(x_NI, weight, path)
        assert not y_NO[0, -1].isfinite()
        assert y_NO[1].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_nothing_times_anything_is_nothing(path):
    for weight in (bitmask.pack(half_pruned(5, 70)), codes_weight(5, 70, 1, 8, False)):
        assert not sparse_native.multiply(torch.zeros(1, 70), weight, path).any()
        y_NO = sparse_native.multiply(torch.ones(1, 70), weight, path)
        assert y_NO[0, 0].abs() < 1e-4  # the first row keeps nothing


@pytest.mark.parametrize("batch", [0, 1, 5, 64])
@pytest.mark.parametrize("dtype", bitmask.FLOATS)
def test_any_number_of_rows(monkeypatch, batch, dtype):
    monkeypatch.setattr(sparse, "PANEL", 8)
    coded = codes_weight(19, 96, 3, 4, False)
    steps_OG = coded.scales_OG.to(dtype)
    for weight in (bitmask.pack(half_pruned(19, 96).to(dtype)), replace(coded, scales_OG=steps_OG)):
        x_NI = row_of_x(weight, batch, spread=1)
        y_NO = sparse.multiplied(x_NI, weight)
        assert (y_NO.dtype, y_NO.shape) == (dtype, (batch, 19))
        torch.testing.assert_close(y_NO, linear(x_NI, weight.unpack()), rtol=8 * torch.finfo(dtype).eps, atol=0.1)


def test_without_kernels_torch_multiplies(monkeypatch):
    monkeypatch.setattr(sparse_native, "paths", list)
    monkeypatch.setattr(sparse, "PANEL", 8)
    for weight in (bitmask.pack(half_pruned(19, 96)), codes_weight(19, 96, 3, 4, False)):
        assert not sparse_native.serves(weight)
        x_NI = row_of_x(weight, 3, spread=1)
        torch.testing.assert_close(sparse.multiplied(x_NI, weight), linear(x_NI, weight.unpack()))


def test_odd_groups_have_no_kernel():
    weight = codes_weight(5, 60, 5, 4, False)
    assert not sparse_native.serves(weight)
    x_NI = row_of_x(weight, 2, spread=1)
    torch.testing.assert_close(sparse.multiplied(x_NI, weight), linear(x_NI, weight.unpack()))


def assert_triton_agrees(gpu, weight, batch):
    """Whether Triton unpacks to the bit, and multiplies within float32's rounding and that of the result."""
    dense_OI = weight.unpack()
    assert torch.equal(gpu.unpack(weight), dense_OI)
    x_NI = row_of_x(weight, batch, spread=1)
    y_NO = gpu.multiply(x_NI, weight)
    exact_NO = linear(x_NI.double(), dense_OI.double())
    bound_NO = (weight.shape[1] / 8 + 16) * 2**-24 * linear(x_NI.double().abs(), dense_OI.double().abs())
    bound_NO += torch.finfo(weight.dtype).eps * exact_NO.abs() + torch.finfo(weight.dtype).tiny
    assert y_NO.dtype == weight.dtype
    assert ((y_NO.double() - exact_NO).abs() <= bound_NO).all()


@pytest.mark.parametrize("dtype", bitmask.FLOATS)
@given(w_OI=weights(), batch=st.integers(1, 16))
@settings(deadline=None, max_examples=15)
def test_triton_agrees(gpu, dtype, w_OI, batch):
    assert_triton_agrees(gpu, bitmask.pack(w_OI.to(dtype)), batch)


@pytest.mark.parametrize("dtype", bitmask.FLOATS)
@given(weight=quantized(), batch=st.integers(1, 16))
@settings(deadline=None, max_examples=15)
def test_triton_agrees_with_codes(gpu, dtype, weight, batch):
    packed = bitmask.pack_codes(weight)
    assert_triton_agrees(gpu, replace(packed, scales_OG=packed.scales_OG.to(dtype)), batch)


@pytest.mark.parametrize(("rows", "columns"), [(6, 4099), (17, 577), (3, 2176), (1, 1)])
@pytest.mark.parametrize("batch", some_slow([1, 3], {1}))
def test_triton_carries_from_tile_to_tile_and_from_band_to_band(gpu, rows, columns, batch):
    w_OI = half_pruned(rows, columns)
    for dtype in bitmask.FLOATS:
        assert_triton_agrees(gpu, bitmask.pack(w_OI.to(dtype)), batch)
    for bits in (4, 8):
        assert_triton_agrees(gpu, codes_weight(rows, columns, 1, bits, symmetric=bits == 8), batch)


@pytest.mark.parametrize(("columns", "group"), [(2176, 128), (1056, 32), (1040, 16), (60, 12)])
@pytest.mark.parametrize(("bits", "symmetric"), some_slow([(4, False), (3, True), (8, False), (5, True)], {(3, True)}))
def test_triton_agrees_with_groups_of_codes(gpu, columns, group, bits, symmetric):
    """Groups of more than a word and of less, also where they end within one."""
    weight = codes_weight(13, columns, columns // group, bits, symmetric)
    for dtype, batch in ((torch.float32, 1), (torch.bfloat16, 5)):
        assert_triton_agrees(gpu, replace(weight, scales_OG=weight.scales_OG.to(dtype)), batch)


def test_what_is_no_number_shows_in_triton(gpu):
    for weight in (bitmask.pack(half_pruned(5, 70)), codes_weight(5, 70, 1, 4, False)):
        x_NI = torch.ones(2, 70)
        x_NI[0, 3] = torch.nan
        y_NO = gpu.multiply(x_NI, weight)
        assert not y_NO[0, -1].isfinite()
        assert y_NO[1].isfinite().all()


@pytest.mark.parametrize("batch", [0, 1, 70])
def test_other_devices_multiply_without_waiting(batch):
    """A device that is neither CPU nor CUDA: the same numbers as by panels, and no wait for one of them."""
    weights = [bitmask.pack(half_pruned(19, 96).to(dtype)) for dtype in bitmask.FLOATS]
    weights += [codes_weight(19, 96, 3, bits, bits == 8) for bits in (4, 8)]
    for weight in weights:
        x_NI = row_of_x(weight, batch, spread=1)
        tensors = ("masks_BCR", "values", "offsets", "scales_OG", "zeros_OG")
        there = {name: tensor.to(DEVICE) for name in tensors if (tensor := getattr(weight, name)) is not None}
        moved, x_there_NI = replace(weight, **there), x_NI.to(DEVICE)
        reset()
        y_NO, dense_OI = sparse.multiplied(x_there_NI, moved), sparse.unpacked(moved)
        assert not counts.syncs
        assert torch.equal(y_NO.cpu(), linear(x_NI, weight.unpack()))
        assert torch.equal(dense_OI.cpu(), weight.unpack())
