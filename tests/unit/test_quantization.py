"""Equation 7 by hand and by loops, its gradient by finite differences, and zeros that survive."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from besa import kernels
from besa.counting.budget import Budget
from besa.counting.masks import rank
from besa.errors import BesaError
from besa.methods.allocation import RankedLinear
from besa.pruning.quantizing import settle
from besa.quantization import Clipping, MinMax
from besa.quantization.minmax import codes, dequantized, extremes, grid, step_gradient
from besa.storage.formats.codes import KEYS, decode, encode, is_zero


def test_equation_7_by_hand():
    """W from −1 to 2 in 2 bits: h = 3 / 3 = 1, z = 1."""
    w_OI = torch.tensor([[-1.0, -0.4, 0.6, 2.0]])
    found = grid(*extremes(w_OI, 1), 2, symmetric=False)
    assert (found.step_OG.tolist(), found.zero_OG.tolist()) == ([[1]], [[1]])
    assert codes(w_OI, found).tolist() == [[0, 1, 2, 3]]
    assert dequantized(codes(w_OI, found), found, torch.float32).tolist() == [[-1, 0, 1, 2]]
    # γ0 = ½, γ1 = 1: from −½ to 2, h = 5/6, z = round(0.6) = 1; −1 is clamped to code 0.
    low_OG, high_OG = extremes(w_OI, 1)
    clipped = grid(low_OG / 2, high_OG, 2, symmetric=False)
    assert clipped.step_OG.item() == pytest.approx(5 / 6)
    assert clipped.zero_OG.item() == 1
    assert codes(w_OI, clipped).tolist() == [[0, 1, 2, 3]]
    assert dequantized(codes(w_OI, clipped), clipped, torch.float32).tolist() == [
        pytest.approx([-5 / 6, 0, 5 / 6, 5 / 3])
    ]


def test_symmetric_by_hand():
    """W from −1 to 2 in 2 bits, symmetric: h = 4 / 3, z = 2."""
    w_OI = torch.tensor([[-1.0, -0.4, 0.6, 2.0]])
    found = grid(*extremes(w_OI, 1), 2, symmetric=True)
    assert (found.step_OG.item(), found.zero_OG.item()) == (pytest.approx(4 / 3), 2)
    assert codes(w_OI, found).tolist() == [[1, 2, 2, 3]]  # 2 / h is rounded to 2, and 4 clamped to 3


def test_groups_are_of_consecutive_columns():
    w_OI = torch.tensor([[-1.0, 1.0, -8.0, 4.0], [2.0, 1.0, -3.0, -1.0]])
    low_OG, high_OG = extremes(w_OI, 2)
    assert low_OG.tolist() == [[-1, -8], [0, -3]]  # zero is always between them
    assert high_OG.tolist() == [[1, 4], [2, 0]]


@st.composite
def weights(draw):
    """A weight, its groups, bits and symmetry."""
    groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    rows = draw(st.integers(1, 4) if groups == 1 else st.integers(17, 20))
    w_OI = torch.randn(rows, groups * size, generator=generator)
    w_OI = w_OI * draw(st.sampled_from([1e-3, 1, 50])) + draw(st.sampled_from([0, 0.5]))
    return w_OI, groups, draw(st.integers(2, 8)), draw(st.booleans())


@given(weights())
@settings(deadline=None)
def test_equation_7_word_for_word(case):
    w_OI, groups, bits, symmetric = case
    found = grid(*extremes(w_OI, groups), bits, symmetric)
    q_OI = dequantized(codes(w_OI, found), found, torch.float32)
    size = w_OI.shape[1] // groups
    for o, row in enumerate(w_OI.tolist()):
        for g in range(groups):
            part = row[g * size : (g + 1) * size]
            low, high = min(0, *part), max(0, *part)
            if symmetric:
                low, high = -max(high, -low), max(high, -low)
            h = max((high - low) / (2**bits - 1), 1e-7)
            assert found.step_OG[o, g].item() == pytest.approx(h, rel=1e-5)
            z = int(found.zero_OG[o, g])
            assert 0 <= z <= 2**bits - 1
            assert abs(z - (2 ** (bits - 1) if symmetric else -low / h)) <= 0.5 + 1e-3
            for i, w in enumerate(part):
                lowest, highest = -z * h, (2**bits - 1 - z) * h
                nearest = min(max(w, lowest), highest)
                assert abs(q_OI[o, g * size + i].item() - nearest) <= h / 2 * (1 + 1e-3)


@given(weights())
@settings(deadline=None)
def test_the_gradient_of_the_step_is_straight_through(case):
    """Finite differences of (W/h + c)·h with the rounding error c held, and of clamped codes times h."""
    w_OI, groups, bits, symmetric = case
    w_OI = w_OI.double().float()
    low_OG, high_OG = extremes(w_OI, groups)
    found = grid(0.7 * low_OG, 0.6 * high_OG, bits, symmetric)
    gradient_OI = torch.randn(w_OI.shape, generator=torch.Generator().manual_seed(0))
    slope_OG = step_gradient(gradient_OI, w_OI, found)
    size = w_OI.shape[1] // groups
    for o in range(w_OI.shape[0]):
        for g in range(groups):
            h, z = found.step_OG[o, g].item(), found.zero_OG[o, g].item()
            expected = 0.0
            for i in range(g * size, (g + 1) * size):
                ratio = float(w_OI[o, i] / found.step_OG[o, g])
                free = round(ratio) + z
                code = min(max(free, 0), 2**bits - 1)
                slope = code - z - (ratio if code == free else 0)
                expected += float(gradient_OI[o, i]) * slope
            assert slope_OG[o, g].item() == pytest.approx(expected, rel=1e-3, abs=1e-3 * abs(h) + 1e-3)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_gradient_of_gamma_is_that_of_autograd(symmetric):
    """Through a rounding that hands gradients on, as OmniQuant's does."""
    generator = torch.Generator().manual_seed(0)
    w_OI, gradient_OI = torch.randn(2, 5, 12, generator=generator)
    clipping = Clipping(w_OI, 3, 3, symmetric, learned=True)
    with torch.no_grad():
        clipping.logits_2OG.copy_(torch.randn(2, 5, 3, generator=generator))
    q_OI = torch.empty_like(w_OI)
    kernels.quantized(clipping, q_OI)
    found_2OG = kernels.clipping_gradient(gradient_OI, clipping)

    logits = clipping.logits_2OG.detach().clone().requires_grad_()
    low_OG, high_OG = extremes(w_OI, 3)
    found = grid(logits[0].sigmoid() * low_OG, logits[1].sigmoid() * high_OG, 3, symmetric)
    ratio = w_OI.reshape(5, 3, 4) / found.step_OG[..., None]
    rounded = ratio + (ratio.round() - ratio).detach()
    free = rounded + found.zero_OG[..., None].detach()
    # The gradient of torch's clamp at its ends is 1 until torch 2.13, and 0 from 2.14 on.
    code = torch.where((free >= 0) & (free <= 7), free, free.detach().clamp(0, 7))
    reference = (code - found.zero_OG[..., None].detach()) * found.step_OG[..., None]
    torch.testing.assert_close(reference.reshape(5, 12), q_OI)
    (reference.reshape(5, 12) * gradient_OI).sum().backward()
    torch.testing.assert_close(found_2OG, logits.grad, rtol=1e-4, atol=1e-5)


def ranked(w_OI: torch.Tensor) -> RankedLinear:
    return RankedLinear(w_OI, w_OI.float().abs(), rank(w_OI.float().abs(), w_OI))


@given(weights(), st.floats(0, 1), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None)
def test_zeros_survive_packing_and_meet_the_budget(case, sparsity, dtype):
    w_OI, groups, bits, symmetric = case
    w_OI = w_OI.to(dtype)
    rows, columns = w_OI.shape
    clipping = Clipping(w_OI, groups, bits, symmetric, learned=False)
    rounded = int((clipping.quantized(dtype).weight() == 0).sum())
    zeros = round(sparsity * w_OI.numel())
    counts = {"b.w": torch.full((rows,), round(sparsity * columns))}
    budgets = [Budget(("b.w",), w_OI.numel(), zeros)]
    if 0 < zeros < rounded:
        with pytest.raises(BesaError, match="zeros already"):
            settle({"b.w": ranked(w_OI)}, {"b.w": clipping}, counts, budgets)
        return
    settled = settle({"b.w": ranked(w_OI)}, {"b.w": clipping}, counts, budgets)
    q_OI = settled["b.w"].weight()
    assert q_OI.dtype == dtype
    assert int((q_OI == 0).sum()) == (zeros or rounded)
    kept_OI = q_OI != 0
    assert torch.equal(q_OI[kept_OI], clipping.quantized(dtype).weight()[kept_OI])

    stored = encode({"b.w.weight": w_OI, "b.w.bias": w_OI[0]}, settled)
    assert ("b.w.weight_zero_point" in stored) != symmetric
    of_linear = {key: stored[f"b.w.{key}"] for key in KEYS if f"b.w.{key}" in stored}
    assert torch.equal(is_zero(of_linear, bits), ~kept_OI)
    settings_ = MinMax(bits=bits, symmetric=symmetric)
    if groups > 1:
        settings_ = settings_.model_copy(update={"group": columns // groups})
    dense = decode(stored, settings_)
    assert dense.keys() == {"b.w.weight", "b.w.bias"}
    assert torch.equal(dense["b.w.weight"], q_OI)


def test_only_linears_of_the_file_are_stored_as_codes():
    w_OI = torch.randn(4, 6)
    quantized = {"b.experts.0": Clipping(w_OI, 1, 4, False, learned=False).quantized(torch.float32)}
    with pytest.raises(BesaError, match=r"b\.experts\.0 cannot be stored as codes.*--dequantized"):
        encode({"b.experts": torch.randn(2, 4, 6)}, quantized)


def test_odd_groups_are_refused():
    assert MinMax(group=64).groups("w", 576) == 9
    with pytest.raises(BesaError, match="w has 576 columns, which are no whole number of groups of 128"):
        MinMax(group=128).groups("w", 576)


def test_a_few_rows_of_several_groups_are_refused():
    w_OI = torch.randn(8, 64)
    quantized = {"b": Clipping(w_OI, 2, 4, False, learned=False).quantized(torch.float32)}
    with pytest.raises(BesaError, match="b has only 8 rows"):
        encode({"b.weight": w_OI}, quantized)
