"""Codes that are held in another order: products, which have a kernel, and when they are chosen."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from besa.kernels import held, sparse_native
from besa.kernels.reading import USUAL, WAYS
from besa.quantization import Grid, Quantized
from besa.runtime.kept import Kept
from besa.runtime.linear import SparseLinear
from besa.storage.formats import bitmask
from tests.sparse_weights import codes_weight, row_of_x
from tests.unit.test_bitmask import quantized
from tests.unit.test_sparse import assert_close, with_threads

ORDERS = [path for path in ("avx2", "avx512") if path in sparse_native.paths()]
GRIDS = [(2176, 2176), (70, 70), (1, 1), (2176, 128), (960, 192), (1088, 64), (1056, 32), (64, 32)]
some_order = pytest.mark.skipif(not ORDERS, reason="this processor has codes in the order of the file only")


@pytest.fixture(params=ORDERS or ["plain"])
def path(request, monkeypatch, tmp_path):
    """As on a processor that has an instruction set, and has measured nothing yet."""
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sparse_native, "paths", lambda: [request.param, "plain"])
    for measured in (held._gains, held._fastest, sparse_native._fastest):
        measured.cache_clear()
    yield request.param
    for measured in (held._gains, held._fastest, sparse_native._fastest):
        measured.cache_clear()


def of_dtype(weight, dtype):
    return replace(weight, scales_OG=weight.scales_OG.to(dtype))


@some_order
@pytest.mark.parametrize(("columns", "group"), [*GRIDS, (320, 16), (320, 8), (9000, 9000)])
@pytest.mark.parametrize("rows", [1, 7, 8, 21])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (3, True), (8, False), (8, True)])
def test_products(path, columns, group, rows, bits, symmetric):
    weight = codes_weight(rows, columns, columns // group, bits, symmetric)
    served = path == "avx2" or (bits < 8 and group not in (8, 16))
    assert (held.most(weight) > 0) == served
    if not served:
        return
    for dtype in bitmask.FLOATS:
        coded = of_dtype(weight, dtype)
        for spread in (0.1, 3):  # numbers of two digits, and of three
            count = min(held.most(weight), 6)  # rows that meet a weight together, and one by one
            x_NI = row_of_x(coded, count, spread=spread).float()
            y_NO = held.Product(coded)(x_NI)
            assert_close(y_NO, x_NI, coded)
            for n in range(count):
                assert torch.equal(held.Product(coded)(x_NI[n : n + 1]), y_NO[n : n + 1])


@some_order
@pytest.mark.usefixtures("path")
def test_codes_of_another_state_are_multiplied(monkeypatch):
    """Held codes are a copy, so it must go when `load_state_dict` writes others over the bitmask."""
    monkeypatch.setattr(held, "pays", lambda weight, threads: held.most(weight) > 0)
    weight = codes_weight(21, 1088, 17, 4, False)
    values = weight.values.clone()
    values[: -bitmask.PADDING] ^= 0x11  # the lowest bit of each code
    linear, other, x_NI = SparseLinear(weight), SparseLinear(replace(weight, values=values)), row_of_x(weight, 3)
    before_NO = linear(x_NI)
    linear.load_state_dict(other.state_dict())
    assert_close(linear(x_NI), x_NI, other.bitmask)
    assert not torch.equal(linear(x_NI), before_NO)


@some_order
@pytest.mark.usefixtures("path")
@given(weight=quantized(), threads=st.integers(1, 3), spread=st.sampled_from([0.1, 1, 3]))
@settings(deadline=None, max_examples=60)
def test_products_of_any_weight(weight, threads, spread):
    packed = bitmask.pack_codes(weight)
    if held.most(packed):
        x_NI = row_of_x(packed, 1, spread=spread).float()
        assert_close(with_threads(threads, held.Product(packed), x_NI), x_NI, packed)


@some_order
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("numbers", [range(32630, 32780), range(-32780, -32630), [8_355_711, -8_355_711, 65_535, 0]])
def test_every_digit_counts(path, bits, numbers):
    """One code of 1 shows each whole number of x, where digits are carried and where all are largest."""
    if bits == 8 and path != "avx2":
        return
    numbers = torch.tensor([*numbers, *[0] * (-len(numbers) % 32)])
    codes_OI = torch.eye(len(numbers), dtype=torch.uint8)
    steps = Grid(torch.ones(len(numbers), 1), torch.zeros(len(numbers), 1), bits)
    weight = bitmask.pack_codes(Quantized(codes_OI, steps, False, torch.float32))
    unit = numbers.abs().max() / 8_355_711  # what float32 is divided into
    assert torch.allclose(held.Product(weight)(numbers[None].float())[0], numbers.float(), rtol=0, atol=float(unit))


@some_order
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("trouble", [torch.inf, torch.nan])
def test_what_is_no_number_shows(trouble):
    weight = codes_weight(5, 70, 1, 4, False)
    x_NI = torch.ones(1, 70)
    x_NI[0, 3] = trouble
    assert not held.Product(weight)(x_NI)[0, -1].isfinite()


@pytest.mark.skipif("avx512" not in ORDERS, reason="needs AVX-512")
def test_every_way_to_read_adds_in_the_same_order(monkeypatch, tmp_path):
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "cache"))
    for columns, group in GRIDS:
        weight = codes_weight(130, columns, columns // group, 4, False)
        product, x_NI = held.Product(weight, USUAL), row_of_x(weight, 1).float()
        y_NO = product(x_NI)
        for way in WAYS:
            product.read(way)
            assert torch.equal(product(x_NI), y_NO)


@some_order
@pytest.mark.usefixtures("path")
def test_half_precision_is_widened_and_rounded_as_torch_does():
    weight = of_dtype(codes_weight(21, 320, 5, 4, False), torch.bfloat16)
    x_NI, product = row_of_x(weight, 2), held.Product(weight)
    assert product(x_NI).dtype == torch.bfloat16
    assert torch.equal(product(x_NI), product(x_NI.float()).bfloat16())
    strided_NI = torch.stack([x_NI, x_NI], dim=2)[..., 0]
    assert torch.equal(product(strided_NI[None]), product(x_NI)[None])


@some_order
def test_the_largest_sums_fit(path):
    """Largest codes and largest numbers of x, of either sign, in pieces as long as they may be."""
    for bits in (4, 8) if path == "avx2" else (4,):
        codes_OI = torch.full((9, 4096), 2**bits - 1, dtype=torch.uint8)
        for zero in (0.0, 2.0**bits - 1):
            grid = Grid(torch.ones(9, 1), torch.full((9, 1), zero), bits)
            weight = bitmask.pack_codes(Quantized(codes_OI, grid, False, torch.float32))
            for sign in (1, -1):
                numbers = torch.full((1, 4096), sign * 32639.0)
                numbers[0, 0] = 8_355_711  # makes the unit 1
                assert_close(held.Product(weight)(numbers), numbers, weight)


@some_order
def test_numbers_that_change_in_place_are_prepacked_anew(monkeypatch):
    monkeypatch.setattr(held, "pays", lambda weight, threads: True)
    linear = SparseLinear(codes_weight(128, 320, 5, 4, False))
    x_NI = torch.randn(1, 320)
    before = linear(x_NI)
    assert linear.product.prepacked
    steps = Kept(nn.ModuleList([nn.Identity(), linear]), lambda: linear.product)
    product = steps.now()
    assert steps.now() is product
    linear.weight_scale.mul_(2)
    torch.testing.assert_close(linear(x_NI), 2 * before)
    assert steps.now() is linear.product is not product


def test_other_weights_are_not_held():
    assert not held.most(codes_weight(8, 320, 80, 4, True))  # groups of 4
    assert not held.most(codes_weight(8, 320, 80, 8, True))
    assert not held.most(bitmask.pack(torch.ones(8, 320)))


@some_order
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("seconds", "pays"), [(0.94, True), (0.96, False)])
def test_codes_are_held_where_that_is_faster_by_a_twentieth(monkeypatch, tmp_path, seconds, pays):
    """It is measured once on a machine, by a clock on which a product with held codes takes so many seconds."""
    clock, calls = [0.0], []

    def timed(took, product):
        call = product.__call__

        def called(self, x_NI):
            clock[0] += took
            calls.append((product, len(x_NI)))
            return call(self, x_NI)

        monkeypatch.setattr(product, "__call__", called)

    weight, asked = codes_weight(1024, 320, 5, 4, False), set()
    assert weight.nbytes >= sparse_native.LARGE

    def samples(kind, group=128):
        asked.add((kind, group))
        return [codes_weight(8, sparse_native.COLUMNS, 32, 4, False)]

    monkeypatch.setattr(sparse_native, "samples", samples)
    monkeypatch.setattr(held.time, "perf_counter", lambda: clock[0])
    timed(seconds, held.Product)
    timed(1.0, sparse_native.Product)
    linear, most = SparseLinear(weight), held.most(weight)
    x_NI = row_of_x(weight, most + 1, spread=1)
    linear(x_NI[:1])
    assert ("int4", 64) in asked
    calls.clear()
    for count in (1, most, most + 1):
        assert_close(linear(x_NI[:count]), x_NI[:count], weight)
    assert [rows for product, rows in calls if product is held.Product] == ([1, most] if pays else [])
    made = list(linear._product._of_threads.values())
    assert [isinstance(one, held.Product) for one in made] == [pays]
    kept = [json.loads(path.read_text()) for path in (tmp_path / "cache" / "kernels").glob("*.json")]
    assert [one["found"] for one in kept if one["subject"].startswith("whether held")] == [pays]
    with_threads(torch.get_num_threads() + 1, linear, x_NI[:1])
    first, second = linear._product._of_threads.values()
    assert (first is second) == pays  # held codes are shared
    assert not held.pays(codes_weight(8, 320, 5, 4, False), torch.get_num_threads())  # too small to matter
