"""Dense matrices in codes of eight bits: what is rounded, products against exact ones, and damage."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from besa import BesaError
from besa.kernels import row_codes as kernels
from besa.storage.formats import row_codes
from besa.storage.formats.row_codes import RowCodes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows of different sizes, one of zeros."""
    generator = torch.Generator().manual_seed(rows + columns)
    w_OI = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    w_OI[rows // 2] = 0
    return w_OI.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_is_half_a_step_from_its_code_at_most(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    w_OI = matrix(37, 96, dtype)
    coded = row_codes.pack(w_OI)
    exact_OI = coded.codes_OI.double() * coded.steps_O1.double()
    off_OI = (exact_OI - w_OI.double()).abs() / coded.steps_O1.double()
    at_ends_OI = coded.codes_OI.abs() >= 127
    assert off_OI[~at_ends_OI].max() <= 0.5 + 1e-4
    assert off_OI.max() <= (0.75 if dtype != torch.float32 else 0.5 + 1e-4)
    largest_O1 = w_OI.double().abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(coded.steps_O1.double(), largest_O1 / 127.5, rtol=2**-8, atol=2e-7)
    assert coded.dtype == dtype
    assert coded.codes_OI[18].eq(0).all()
    monkeypatch.setattr(row_codes, "PANEL", 200)
    again = row_codes.pack(w_OI)
    assert torch.equal(again.codes_OI, coded.codes_OI)
    assert torch.equal(again.steps_O1, coded.steps_O1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_the_dense_matrix(dtype: torch.dtype) -> None:
    coded = row_codes.pack(matrix(37, 96, dtype))
    places_N = torch.tensor([36, 0, 5, 5])
    assert torch.equal(coded.rows(places_N), coded.unpack()[places_N])
    for place in (-1, 37):
        with pytest.raises(IndexError):
            coded.rows(torch.tensor([5, place]))
    assert torch.equal(coded.unpack(slice(8, 20)), coded.unpack()[8:20])
    assert torch.equal(coded.unpack(), coded.codes_OI.to(dtype) * coded.steps_O1)


@pytest.mark.parametrize("path", kernels.paths())
@pytest.mark.parametrize("columns", [1, 15, 96, 130, 576])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 9])
def test_products_are_exact_but_for_sums_in_float32(path: str, columns: int, batch: int) -> None:
    coded = row_codes.pack(matrix(71, columns, torch.bfloat16))
    x_NI = torch.randn(batch, columns, generator=torch.Generator().manual_seed(1))
    w_OI = coded.codes_OI.double() * coded.steps_O1.double()
    allowed_NO = (columns / 16 + 24) * 2**-24 * (x_NI.double().abs() @ w_OI.abs().T)
    off_NO = (kernels.multiply(x_NI, coded, path).double() - x_NI.double() @ w_OI.T).abs()
    assert bool((off_NO <= allowed_NO).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 1, kernels.MANY])
def test_all_ways_give_the_product_of_the_dense_matrix(
    dtype: torch.dtype, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded = row_codes.pack(matrix(71, 96, dtype))
    x_NI = torch.randn(batch, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected_NO = x_NI.double() @ coded.unpack().double().T
    step = {torch.float32: 2**-18, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    for panel in (kernels.PANEL, 20):
        monkeypatch.setattr(kernels, "PANEL", panel)
        found_NO = kernels.multiplied(x_NI, coded)
        assert found_NO.dtype == dtype
        torch.testing.assert_close(found_NO.double(), expected_NO, rtol=step, atol=8 * step)
    monkeypatch.setattr(kernels, "paths", list)
    torch.testing.assert_close(kernels.multiplied(x_NI, coded).double(), expected_NO, rtol=step, atol=8 * step)


def test_damage_is_refused() -> None:
    coded = row_codes.pack(matrix(8, 16, torch.bfloat16))
    coded.check("head")
    for damaged, says in [
        (replace(coded, codes_OI=coded.codes_OI.view(torch.uint8)), "do not fit"),
        (replace(coded, codes_OI=coded.codes_OI[1:]), "do not fit"),
        (replace(coded, codes_OI=coded.codes_OI.flatten()), "do not fit"),
        (replace(coded, steps_O1=coded.steps_O1[:, 0]), "do not fit"),
        (replace(coded, steps_O1=coded.steps_O1.double()), "do not fit"),
        (RowCodes(torch.zeros(0, 4, dtype=torch.int8), torch.ones(0, 1)), "do not fit"),
        (replace(coded, steps_O1=-coded.steps_O1), "not all positive"),
        (replace(coded, steps_O1=coded.steps_O1 * torch.nan), "not all positive"),
    ]:
        with pytest.raises(BesaError, match=f"head in codes is damaged: .*{says}"):
            damaged.check("head")
    with pytest.raises(BesaError, match="float64 cannot be coded"):
        row_codes.pack(torch.zeros(2, 2, dtype=torch.float64))
