"""Codes for weights that have moved: the sweep against GPTQ done slowly, zeros, grids, and held-out tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from besa.methods.reconstruction import rounding
from besa.methods.reconstruction.obs_update import inverse_factor
from besa.methods.reconstruction.ridge import best_ridge, held_out_error, solve, with_ridge
from besa.methods.reconstruction.rounding import round_columns, unrounded
from besa.observing.input_statistics import InputStatistics
from besa.quantization import Grid, Moved, Unrounded
from besa.quantization.minmax import dequantized, extremes, grid, kept_codes
from besa.quantization.searching import SHARES, best_grid
from besa.storage.formats import unrounded as stored

ROWS, WIDTH, TOKENS = 6, 24, 120


def drawn(seed, rows=ROWS, width=WIDTH, tokens=TOKENS, sparsity=0.5):
    """A pruned weight, the dense weight, and inputs that are correlated."""
    generator = torch.Generator().manual_seed(seed)
    dense_OI = torch.randn(rows, width, generator=generator)
    x_TI = torch.randn(tokens, width, generator=generator)
    x_TI += x_TI @ torch.randn(width, width, generator=generator) / 3
    w_OI = dense_OI.where(torch.rand(rows, width, generator=generator) >= sparsity, 0)
    return w_OI, dense_OI, x_TI


def statistics_of(x_TI):
    """Of which the last quarter is held out."""
    statistics = InputStatistics.empty(x_TI.shape[1], True, x_TI.device)
    statistics.add(x_TI, [False, False, False, True])
    return statistics


def values_of(grid, row, column, width):
    """All values of the grid of a weight."""
    group = column // (width // grid.step_OG.shape[1])
    step, zero = grid.step_OG[row, group].item(), grid.zero_OG[row, group].item()
    return [(code - zero) * step for code in range(grid.largest + 1)]


def nearest(value, values):
    """The nearest of some values that is not zero, if the value is not."""
    return min((v for v in values if v != 0), key=lambda v: abs(v - value)) if value != 0 else 0.0


@given(st.integers(0, 10**6), st.integers(2, 8), st.sampled_from([1, 2, 3]), st.booleans(), st.sampled_from([-1, 0, 2]))
@settings(deadline=None)
def test_only_pruned_weights_have_the_code_of_zero(seed, bits, groups, symmetric, shift):
    """The others have the nearest code but that of zero; groups of one sign have zero at the end of the grid."""
    w_OI, _, _ = drawn(seed)
    w_OI = torch.where(w_OI != 0, w_OI + shift, 0)
    found = grid(*extremes(0.9 * w_OI, groups), bits, symmetric)
    q_OI = dequantized(kept_codes(w_OI, found), found, torch.float32)
    assert torch.equal(q_OI == 0, w_OI == 0)
    for row in range(ROWS):
        for column in range(WIDTH):
            values = values_of(found, row, column, WIDTH)
            value = w_OI[row, column].item()
            error = abs(nearest(value, values) - value)
            assert abs(q_OI[row, column].item() - value) == pytest.approx(error, abs=1e-5)


def slowly(w_OI, hessian_II, grid):
    """GPTQ by its definition: after a column is rounded, those to its right move to where the error is least."""
    left_OI, before_OI = w_OI.double(), torch.zeros_like(w_OI, dtype=torch.float64)
    for j in range(WIDTH):
        inverse_II = torch.linalg.inv(hessian_II[j:, j:])  # anew for every column
        for o in range(ROWS):
            value = left_OI[o, j].item() if w_OI[o, j] != 0 else 0.0
            before_OI[o, j] = value
            error = left_OI[o, j].item() - nearest(value, values_of(grid, o, j, WIDTH))
            left_OI[o, j:] -= error / inverse_II[0, 0] * inverse_II[0]
    return before_OI


@pytest.mark.parametrize("columns", [5, 8, 128])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_sweep_is_gptq_on_a_mask(columns, groups, monkeypatch):
    """With blocks of columns that are no whole number of groups, and the other way round."""
    monkeypatch.setattr(rounding, "COLUMNS", columns)
    w_OI, _, x_TI = drawn(7)
    hessian_II = x_TI.double().T @ x_TI.double()
    hessian_II.diagonal().mul_(1.1)
    found = grid(*extremes(w_OI, groups), 4, False)
    before_OI = round_columns(w_OI, inverse_factor(torch.linalg.inv(hessian_II)).float(), found)
    expected_OI = slowly(w_OI, hessian_II, found)
    torch.testing.assert_close(before_OI.double(), expected_OI, rtol=1e-3, atol=1e-3)
    assert torch.equal(before_OI == 0, w_OI == 0)
    assert torch.equal(kept_codes(before_OI, found), kept_codes(expected_OI.float(), found))
    change_OI, plain_OI = (
        dequantized(kept_codes(x_OI, found), found, torch.float32).double() - w_OI.double()
        for x_OI in (before_OI, w_OI)
    )
    assert (change_OI @ hessian_II * change_OI).sum() < (plain_OI @ hessian_II * plain_OI).sum()


@given(
    st.integers(0, 10**6),
    st.sampled_from([4, 8]),
    st.sampled_from([1, 3]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(["searched", "none"]),
    st.sampled_from([4, 40, 400]),
)
@settings(deadline=None, max_examples=60)
def test_never_worse_than_rounding_on_held_out_tokens(seed, bits, groups, dtype, clipping, tokens):
    w_OI, dense_OI, x_TI = (x.to(dtype) for x in drawn(seed, tokens=tokens))
    statistics = statistics_of(x_TI.float())
    settings = Moved(bits=bits, clipping=clipping)
    found = unrounded(w_OI, dense_OI, statistics, settings, groups)
    plain = unrounded(w_OI, dense_OI, statistics, settings.model_copy(update={"rounding": "nearest"}), groups)
    assert torch.equal(plain.w_OI, w_OI)
    assert torch.equal(plain.grid.step_OG, found.grid.step_OG)
    quantized = found.quantized()
    q_OI = quantized.weight()
    assert q_OI.dtype == dtype
    assert torch.equal(q_OI == 0, w_OI == 0)
    assert torch.equal(found.w_OI == 0, w_OI == 0)
    assert int(quantized.codes_OI.max()) < 2**bits
    assert torch.equal(dequantized(quantized.codes_OI, found.grid, dtype), q_OI)
    swept, rounded = (held_out_error(x_OI, dense_OI, statistics) for x_OI in (q_OI, plain.quantized().weight()))
    assert swept <= rounded


def test_the_sweep_takes_away_what_rounding_adds():
    """Else the choice between it and plain rounding would hide a sweep that does nothing."""
    shares = []
    for seed in range(12):
        w_OI, dense_OI, x_TI = drawn(seed, tokens=400, sparsity=0.3)
        statistics, kept_OI = statistics_of(x_TI), w_OI != 0
        hessian_II = with_ridge(statistics, best_ridge(dense_OI, kept_OI, statistics))
        w_OI = solve(dense_OI, kept_OI, hessian_II, 10)
        ways = [unrounded(w_OI, dense_OI, statistics, Moved(bits=3, rounding=way), 1) for way in ("sweep", "nearest")]
        weights = [w_OI, *(way.quantized().weight() for way in ways)]
        free, swept, rounded = (held_out_error(x_OI, dense_OI, statistics).item() for x_OI in weights)
        shares.append((swept - free) / (rounded - free))
    assert sum(shares) / len(shares) < 0.9


def test_the_best_share_of_each_group():
    w_OI, _, x_TI = drawn(3)
    squares_I = x_TI.square().sum(dim=0)
    found = best_grid(w_OI, squares_I, 3, 4, False, SHARES)
    low_OG, high_OG = extremes(w_OI, 3)
    for row in range(ROWS):
        for group in range(3):
            part = slice(8 * group, 8 * group + 8)
            errors = {}
            for share in SHARES:
                tried = grid(share * low_OG, share * high_OG, 4, False)
                one = Grid(tried.step_OG[row, group].view(1, 1), tried.zero_OG[row, group].view(1, 1), 4)
                part_1I = w_OI[row, part].view(1, 8)
                change_1I = dequantized(kept_codes(part_1I, one), one, torch.float32) - part_1I
                errors[share] = (change_1I.square() * squares_I[part]).sum().item()
            best = min(SHARES, key=lambda share: errors[share])
            assert found.step_OG[row, group] == grid(best * low_OG, best * high_OG, 4, False).step_OG[row, group]
    assert (best_grid(w_OI, squares_I, 3, 4, False, [1.0]).step_OG >= found.step_OG).all()


def test_the_journal_keeps_weights_and_grids_to_the_bit():
    w_OI = drawn(1)[0].bfloat16()
    weight = Unrounded(w_OI, best_grid(w_OI, torch.ones(WIDTH), 3, 4, False, SHARES), False)
    tensors = {"other": torch.ones(3), "a.b.weight": w_OI}
    found, grids = stored.decode(stored.encode(tensors, {"a.b": weight}), 4)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert torch.equal(Unrounded(w_OI, grids["a.b"], False).quantized().codes_OI, weight.quantized().codes_OI)
