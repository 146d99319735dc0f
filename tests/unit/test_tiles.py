"""Tiles and dense kernels against products in double precision, and how a way to multiply is chosen."""

import ctypes
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from besa.kernels import choosing, dense, sparse, sparse_native, tiles_native
from besa.quantization import Grid, Quantized
from besa.runtime.dense import DenseLinear
from besa.storage.formats import bitmask
from tests.sparse_weights import codes_weight, half_pruned, row_of_x
from tests.unit.test_bitmask import quantized, weights
from tests.unit.test_sparse import assert_close, with_threads

FLOATS = {torch.float32: ["singles"], torch.float16: ["singles"], torch.bfloat16: ["singles", "pairs", "matrix"]}
CASES = [(dtype, path) for dtype, paths in FLOATS.items() for path in paths if path in tiles_native.paths()]
BATCHES = [1, 5, 16, 17, 33, 48, 64, 70]
needs_tiles = pytest.mark.skipif(
    not tiles_native.paths(), reason="this processor has no AVX-512, or there is no compiler"
)

needs_matrix = pytest.mark.skipif(
    tiles_native.MATRIX not in tiles_native.paths(), reason="this processor has no matrix unit, or there is no compiler"
)


def assert_product(y_NO, x_NI, w_OI, rounded=0.0):
    """Whether y is x Wᵀ within what is stated, for numbers of W that are rounded by so much of themselves."""
    x_NI, w_OI = x_NI.double(), w_OI.double()
    bound_NO = ((w_OI.shape[1] / 8 + 16) * 2**-24 + rounded) * linear(x_NI.abs(), w_OI.abs())
    assert y_NO.dtype == torch.float32
    assert ((y_NO.double() - linear(x_NI, w_OI)).abs() <= bound_NO + 1e-30).all()


@needs_tiles
@pytest.mark.parametrize(("dtype", "path"), CASES)
@given(w_OI=weights(), batch=st.sampled_from(BATCHES), threads=st.integers(1, 3))
@settings(deadline=None, max_examples=20)
def test_products_with_floats(dtype, path, w_OI, batch, threads):
    w_OI = w_OI.to(dtype)
    weight = bitmask.pack(w_OI)
    x_NI = row_of_x(weight, batch)
    assert_product(with_threads(threads, tiles_native.multiply, x_NI, weight, path), x_NI, w_OI)
    assert_product(with_threads(threads, tiles_native.multiply, x_NI, w_OI, path), x_NI, w_OI)


@pytest.mark.skipif(not dense.paths(), reason="this processor has no AVX2, or there is no compiler")
@pytest.mark.parametrize("path", dense.paths())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(w_OI=weights(), batch=st.sampled_from([1, 2, 3, 4, *BATCHES]), threads=st.integers(1, 3))
@settings(deadline=None, max_examples=20)
def test_products_with_dense_weights(dtype, path, w_OI, batch, threads):
    if path == tiles_native.PAIRS and dtype != torch.bfloat16:
        return
    w_OI = w_OI.to(dtype)
    x_NI = row_of_x(bitmask.pack(w_OI), batch)
    assert_product(with_threads(threads, dense.multiply, x_NI, w_OI, path), x_NI, w_OI)


@needs_tiles
@pytest.mark.parametrize(("dtype", "path"), CASES)
@given(weight=quantized(), batch=st.sampled_from(BATCHES), threads=st.integers(1, 3))
@settings(deadline=None, max_examples=20)
def test_products_with_codes(dtype, path, weight, batch, threads):
    packed = bitmask.pack_codes(weight)
    packed = replace(packed, scales_OG=packed.scales_OG.to(dtype))
    if sparse_native.serves(packed):
        assert_codes(packed, batch, path, threads)


@needs_tiles
@pytest.mark.parametrize(("dtype", "path"), CASES)
@pytest.mark.parametrize(("columns", "group"), [(2176, 2176), (2176, 128), (1088, 64), (1056, 32), (1040, 16), (72, 8)])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (3, True), (8, False)])
def test_groups_of_codes(dtype, path, columns, group, bits, symmetric):
    weight = codes_weight(13, columns, columns // group, bits, symmetric)
    for batch in (5, 20):
        assert_codes(replace(weight, scales_OG=weight.scales_OG.to(dtype)), batch, path, 1)


def assert_codes(weight, batch, path, threads):
    """Whether the product is that of the numbers of codes, each rounded at most once to the dtype of the weight.

    With few rows of x, the matrix unit multiplies codes as integers, as the kernels for a row do.
    """
    assert tiles_native.serves(weight)
    exact_OI = replace(weight, scales_OG=weight.scales_OG.float()).unpack()
    x_NI = row_of_x(weight, batch)
    y_NO = with_threads(threads, tiles_native.multiply, x_NI, weight, path)
    groups = weight.scales_OG.shape[1]
    if path == tiles_native.MATRIX and batch <= 16 and (groups == 1 or weight.shape[1] // groups % 64 == 0):
        assert_close(y_NO, x_NI.float(), weight)
        return
    assert_product(y_NO, x_NI, exact_OI, torch.finfo(weight.dtype).eps / 2)
    if path in tiles_native.HALVES:
        assert_product(y_NO, x_NI, weight.unpack())


@needs_tiles
@pytest.mark.parametrize(
    ("rows", "columns", "batch"), [(390, 600, 40), (50, 300, 1100), (1, 1, 64), (1024, 31, 16), (1100, 600, 100)]
)
@pytest.mark.parametrize(("dtype", "path"), CASES)
def test_several_panels_blocks_and_passes(dtype, path, rows, columns, batch):
    w_OI = half_pruned(rows, columns).to(dtype)
    weight = bitmask.pack(w_OI)
    x_NI = row_of_x(weight, batch)
    for threads in (1, 2):
        assert_product(with_threads(threads, tiles_native.multiply, x_NI, weight, path), x_NI, w_OI)
        assert_product(with_threads(threads, tiles_native.multiply, x_NI, w_OI, path), x_NI, w_OI)


@needs_tiles
def test_threads_and_other_rows_change_no_bit():
    weight = bitmask.pack(half_pruned(300, 700).bfloat16())
    x_NI = row_of_x(weight, 64)
    y_NO = with_threads(1, tiles_native.multiply, x_NI, weight)
    assert torch.equal(with_threads(2, tiles_native.multiply, x_NI, weight), y_NO)
    for few in (1, 20, 40):
        assert torch.equal(with_threads(1, tiles_native.multiply, x_NI[:few], weight), y_NO[:few])


@needs_tiles
def test_threads_and_other_rows_change_no_bit_of_products_with_codes():
    weight = codes_weight(300, 4864, 38, 4, False)
    weight = replace(weight, scales_OG=weight.scales_OG.bfloat16())
    x_NI = row_of_x(weight, 16)
    y_NO = with_threads(1, tiles_native.multiply, x_NI, weight)
    assert torch.equal(with_threads(2, tiles_native.multiply, x_NI, weight), y_NO)
    assert torch.equal(with_threads(1, tiles_native.multiply, x_NI[:3], weight), y_NO[:3])


@needs_matrix
@pytest.mark.parametrize("columns", [64, 4096, 8256])
def test_every_digit_counts_on_the_matrix_unit(columns):
    """Whole numbers of x, of which one takes a third digit: without that digit, y would be off by far more."""
    generator = torch.Generator().manual_seed(columns)
    codes_OI = torch.randint(256, (20, columns), generator=generator, dtype=torch.uint8)
    steps = Grid(torch.ones(20, 1), torch.full((20, 1), 3.0), 8)
    weight = bitmask.pack_codes(Quantized(codes_OI, steps, False, torch.bfloat16))
    x_NI = torch.randint(-128, 128, (2, columns), generator=generator).float()
    x_NI[1, columns // 2] = 2.0**13  # so many times the mean that it has a third digit
    y_NO = tiles_native.multiply(x_NI.bfloat16(), weight, tiles_native.MATRIX)
    exact_NO = x_NI.double() @ (codes_OI.double() - 3).T
    unit_N1 = x_NI.abs().double().mean(1, keepdim=True) / 2048
    assert ((y_NO - exact_NO).abs() <= 0.51 * unit_N1 * 255 * columns).all()  # half a unit of each x, and rounded sums


@needs_tiles
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_product_is_rounded_in_the_end(dtype):
    w_OI = half_pruned(37, 300).to(dtype)
    weight = bitmask.pack(w_OI)
    x_NI = row_of_x(weight, 520, spread=1)
    y_NO = tiles_native.multiply(x_NI, weight, dtype=dtype)
    assert y_NO.dtype == dtype
    assert torch.equal(y_NO, tiles_native.multiply(x_NI, weight).to(dtype))


@needs_tiles
@pytest.mark.parametrize("trouble", [torch.inf, torch.nan])
def test_what_is_no_number_shows(trouble):
    for weight in (bitmask.pack(half_pruned(5, 70)), codes_weight(5, 70, 1, 4, False), half_pruned(5, 70)):
        x_NI = torch.ones(20, 70)
        x_NI[0, 3] = trouble
        y_NO = tiles_native.multiply(x_NI, weight)
        assert not y_NO[0, -1].isfinite()
        assert y_NO[1:].isfinite().all()


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Choices in a folder of their own, by seconds that the test says; the works that were measured."""
    monkeypatch.setenv("BESA_CACHE", str(tmp_path))
    calls = []

    def measure(works):
        calls.append(works)
        return ["fast"] * len(choosing.COUNTS)

    monkeypatch.setattr(choosing, "_measured", measure)
    return calls


def choose(ways=("slow", "fast"), subject="products"):
    return choosing.fastest(subject, ["tiles.cpp"], ways, dict)


def test_a_choice_is_measured_once_and_kept(measured, tmp_path):
    assert choose() == choose() == ["fast"] * len(choosing.COUNTS)
    assert len(measured) == 1
    (path,) = (tmp_path / "kernels").iterdir()
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"found": ["slow"] * len(choosing.COUNTS)}))
    assert choose() == ["slow"] * len(choosing.COUNTS)  # what the first process found holds
    choose(subject="others")
    assert len(measured) == 2
    path.write_text("{")
    assert choose() == ["fast"] * len(choosing.COUNTS)


def test_one_way_needs_no_measuring(measured):
    assert choose(["fast"]) == ["fast"] * len(choosing.COUNTS)
    assert not measured


def test_where_nothing_can_be_kept_a_choice_holds_for_the_process(measured, tmp_path):
    (tmp_path / "kernels").write_text("no folder")
    assert choose() == ["fast"] * len(choosing.COUNTS)


def test_the_fastest_way_is_taken(monkeypatch):
    seconds = iter([3.0, 1.0] * choosing.ROUNDS * len(choosing.COUNTS))
    monkeypatch.setattr(choosing, "_seconds", lambda work: work())
    works = {"slow": lambda count: lambda: 3.0 * count, "fast": lambda count: lambda: next(seconds)}
    assert choosing._measured(works) == ["fast"] * len(choosing.COUNTS)


def test_places_of_numbers_of_rows():
    assert [choosing.COUNTS[choosing.place(count)] for count in (1, 2, 5, 12, 63, 64, 5000)] == [
        1,
        2,
        4,
        12,
        32,
        64,
        256,
    ]


@pytest.mark.parametrize("way", sparse.WAYS)
def test_every_way_may_be_chosen(monkeypatch, way):
    if way == "tiles" and not tiles_native.paths():
        return
    monkeypatch.setattr(sparse, "_fastest", lambda *_: [way] * len(choosing.COUNTS))
    for dtype in FLOATS:
        weight = bitmask.pack(half_pruned(19, 96).to(dtype))
        x_NI = row_of_x(weight, 9, spread=1)
        y_NO = sparse.multiplied(x_NI, weight)
        assert y_NO.dtype == dtype
        torch.testing.assert_close(y_NO, linear(x_NI, weight.unpack()), rtol=8 * torch.finfo(dtype).eps, atol=0.1)


@pytest.mark.parametrize("way", dense.WAYS)
def test_every_way_may_be_chosen_for_a_dense_weight(monkeypatch, way):
    needed = {"rows": dense.paths(), "tiles": tiles_native.paths(), "torch": ["torch"]}
    if not needed[way]:
        return
    monkeypatch.setattr(dense, "_fastest", lambda *_: [way] * len(choosing.COUNTS))
    for dtype in FLOATS:
        w_OI = half_pruned(19, 96).to(dtype)
        x_NI = row_of_x(bitmask.pack(w_OI), 9, spread=1)
        y_NO = dense.multiplied(x_NI, w_OI)
        assert y_NO.dtype == dtype
        torch.testing.assert_close(y_NO, linear(x_NI, w_OI), rtol=8 * torch.finfo(dtype).eps, atol=0.1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_row_is_the_same_wherever_a_dense_weight_lies(monkeypatch, dtype):
    """Also where torch is the fastest: with AVX2 its sums in float32 depend on the address, modulo 16 bytes."""
    if not dense.paths():
        return
    monkeypatch.setattr(dense, "_fastest", lambda *_: ["torch"] * len(choosing.COUNTS))
    w_OI = half_pruned(37, 96).to(dtype)
    x_NI = row_of_x(bitmask.pack(w_OI), 1)
    memory = torch.empty(w_OI.numel() + 64, dtype=dtype)
    for first in range(0, 64, 3):
        moved = memory[first : first + w_OI.numel()].view_as(w_OI).copy_(w_OI)
        assert torch.equal(dense.multiplied(x_NI, moved), dense.multiplied(x_NI, w_OI))


@pytest.mark.parametrize("path", dense.paths())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_product_for_c_code_is_that_of_few_rows(monkeypatch, path, dtype):
    if path == tiles_native.PAIRS and dtype != torch.bfloat16:
        return
    monkeypatch.setattr(dense, "paths", lambda: [path])
    w_OI = half_pruned(45, 203).to(dtype)
    x_NI, y_NO = row_of_x(bitmask.pack(w_OI), 1), torch.empty(1, 45, dtype=dtype)
    entry = dense.Product(w_OI).entry
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
    call(entry.kernel)(entry.weight, x_NI.data_ptr(), 1, y_NO.data_ptr(), 2)
    assert torch.equal(y_NO, dense.by_rows(x_NI, w_OI))
    assert_product(dense.multiply(x_NI, w_OI), x_NI, w_OI)
    torch.testing.assert_close(y_NO.double(), linear(x_NI.double(), w_OI.double()), rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_linear_is_one_of_torch(bias):
    """The same tensors, and the same outputs; torch's own where gradients are wanted."""
    plain = torch.nn.Linear(70, 30, bias=bias)
    layer = DenseLinear(plain)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert layer.weight is plain.weight
    x_NTI = torch.randn(2, 3, 70)
    with torch.no_grad():
        torch.testing.assert_close(layer(x_NTI), plain(x_NTI))
    layer(x_NTI.requires_grad_()).sum().backward()
    assert plain.weight.grad is not None
    with torch.no_grad():
        assert layer(x_NTI[:, :0]).shape == (2, 0, 30)
