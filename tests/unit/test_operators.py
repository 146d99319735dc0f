"""The operators besides `masked` and `binned`: plain torch against brute force, Triton (interpreted) against it."""

import sys
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from besa import kernels
from besa.errors import Notice
from besa.kernels import operators, reference
from besa.quantization import Clipping
from besa.quantization.minmax import SMALLEST, clipped_grid, step_gradient
from tests.pretend import DEVICE

pytest.importorskip("triton")
from besa.kernels.gpu import apportioning as gpu_apportioning
from besa.kernels.gpu import clipping as gpu_clipping
from besa.kernels.gpu import masks as gpu_masks
from besa.kernels.gpu import rates as gpu_rates
from besa.kernels.gpu import statistics as gpu_statistics
from besa.kernels.gpu import sweep as gpu_sweep
from besa.kernels.gpu.launching import launch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_every_operator_serves_every_kind_of_device():
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("besa::"))
    assert names == [f"besa::{name}" for name in sorted(examples())]
    for name in names:
        for key in ("CPU", "CUDA", "MPS", "XPU"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)
        # a fallback of another device, such as one that counts, must not be passed by
        for key in ("CompositeExplicitAutograd", "CompositeImplicitAutograd"):
            assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def test_without_triton_there_is_one_notice(monkeypatch):
    device = torch.device("cpu")
    assert operators.triton_works(device)  # as the interpreter
    operators.triton_works.cache_clear()
    monkeypatch.delitem(sys.modules, "besa.kernels.gpu.masks", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(Notice, match=r"in plain torch: Triton does not work here \(ModuleNotFoundError") as said:
        assert not operators.triton_works(device)
        assert not operators.triton_works(device)
    assert len(said) == 1
    operators.triton_works.cache_clear()


def test_a_kernel_starts_on_the_device_of_its_first_argument(monkeypatch):
    happened = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: happened.append((grid, arguments, constants))

    @contextmanager
    def device_of(tensor):
        happened.append(tensor)
        yield
        happened.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    first = torch.ones(1)
    launch(Kernel(), (2, 3), first, 5, BLOCK=8)
    assert happened == [first, ((2, 3), (first, 5), {"BLOCK": 8}), "left"]


def fields(clipping):
    return (
        clipping.w_OI,
        clipping.logits_2OG.detach(),
        clipping.low_OG,
        clipping.high_OG,
        clipping.bits,
        clipping.symmetric,
    )


def examples():
    """Arguments of every operator, by name; small whole numbers, so that sums are exact in any order."""
    w_OI, gradient_OI = torch.tensor([[1.0, -2, 3], [-4, 5, 6]]), torch.tensor([[2.0, 1, 0], [1, -1, 3]])
    ranks_OI = torch.tensor([[0, 1, 2], [2, 1, 0]], dtype=torch.int16)
    clipping = Clipping(w_OI, 1, 2, True, learned=False)
    return {
        "masked": (w_OI, ranks_OI, torch.tensor([1, 2]), torch.empty(2, 3)),
        "binned": (gradient_OI, w_OI, ranks_OI, torch.tensor([0, 0, 1], dtype=torch.int16), torch.empty(2, 2)),
        "spread": (w_OI * (ranks_OI > 0), torch.arange(1.0, 5), torch.empty(2, 3)),
        "gathered": (w_OI * (ranks_OI > 0), gradient_OI, torch.empty(4)),
        "pruned_ranks": (torch.tensor([0.5, 0.25]), torch.full((2,), 8.0).double(), torch.tensor([0.5, 0.5]), 0.5),
        "cheapest_counts": (
            torch.tensor([1.5, 2.0]).double(),
            torch.tensor([3.0, 4.0]).double(),
            torch.tensor([0.0, 1.0]).double(),
            4,
        ),
        "quantized": (*fields(clipping), torch.empty(2, 3)),
        "clipping_gradient": (gradient_OI, *fields(clipping)),
        "swept": (w_OI.clone(), w_OI > 0, torch.eye(3), torch.empty(2, 3)),
        "add_squares": (w_OI, torch.ones(3, dtype=torch.float64)),
        "histogram": (ranks_OI, 2),
    }


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize("name", examples())
def test_a_gpu_gets_triton_or_plain_torch(monkeypatch, name, works):
    operator = getattr(torch.ops.besa, name).default
    on_cpu, on_gpu = examples()[name], examples()[name]
    result = operator(*on_cpu)
    monkeypatch.setattr(operators, "triton_works", lambda device: works)
    called = []
    for module in (gpu_apportioning, gpu_clipping, gpu_masks, gpu_rates, gpu_statistics, gpu_sweep):
        if function := getattr(module, name, None):
            monkeypatch.setattr(module, name, lambda *arguments, of=function: called.append(name) or of(*arguments))
    found = operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *on_gpu)
    assert called == [name] * works
    torch.testing.assert_close((found, *on_gpu), (result, *on_cpu), rtol=0, atol=0)


# Apportioning


@st.composite
def rows_to_fill(draw):
    """Ideals, widths, least numbers and a total of a few rows, as `cheapest_counts` takes them."""
    rows = draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    width_R = torch.randint(1, 5000, (rows,), generator=generator).double()
    ideal_R = width_R * (2 * torch.rand(rows, generator=generator).double() - 0.5)
    least_R = (width_R * torch.rand(rows, generator=generator) * draw(st.sampled_from([0, 0.4]))).floor()
    share = draw(st.floats(0, 1))
    return ideal_R, width_R, least_R, int(least_R.sum() + share * (width_R - least_R).sum())


@given(rows_to_fill())
@settings(max_examples=6, deadline=None)
def test_triton_counts_alike(case):
    _, width_R, least_R, total = case
    expected_R = reference.cheapest_counts(*case)
    found_R = gpu_apportioning.cheapest_counts(*case)
    assert bool(((least_R <= found_R) & (found_R <= width_R)).all())
    assert total - len(found_R) <= int(found_R.sum()) <= total
    torch.testing.assert_close(found_R, expected_R, rtol=0, atol=1)  # a step whose price is the last one


def test_triton_counts_rows_beyond_one_round(monkeypatch):
    monkeypatch.setattr(gpu_apportioning, "ROWS", 8)
    ideal_R = torch.linspace(0, 50, 37).double()
    case = (ideal_R, torch.full_like(ideal_R, 50), torch.zeros_like(ideal_R), 700)
    torch.testing.assert_close(gpu_apportioning.cheapest_counts(*case), reference.cheapest_counts(*case))


# Pruning rates


@st.composite
def rates(draw):
    """Expected rates, widths, shares and sparsity of a few rows."""
    groups = draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    alpha_R = torch.rand(groups, generator=generator)
    alpha_R[0] = draw(st.sampled_from([0.0, 1.0, 0.5]))
    width_R = torch.randint(1, 5000, (groups,), generator=generator).double()
    share_R = torch.rand(groups, generator=generator) + 0.01
    return alpha_R, width_R, share_R / share_R.sum(), draw(st.sampled_from([0.01, 0.3, 0.5, 0.99]))


@given(rates())
@settings(deadline=None)
def test_one_shift_meets_the_sparsity(case):
    alpha_R, width_R, share_R, sparsity = case
    found_R = reference.pruned_ranks(alpha_R, width_R, share_R, sparsity)
    shifts = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    reached = (alpha_R.double() + shifts[:, None]).clamp(0, 1) @ share_R.double()
    shift = shifts[(reached - sparsity).abs().argmin()]
    expected_R = (alpha_R.double() + shift).clamp(0, 1) * width_R
    assert ((found_R - expected_R).abs() <= 1 + 3e-5 * width_R).all()


@given(rates())
@settings(deadline=None, max_examples=15)
def test_triton_shifts_alike(case):
    expected_R = reference.pruned_ranks(*case)
    found_R = gpu_rates.pruned_ranks(*case)
    assert found_R.dtype == torch.int64
    assert ((found_R - expected_R).abs() <= 1 + 1e-5 * case[1]).all()  # sums differ in their last bits


def test_triton_takes_more_rows_than_a_tile_has():
    generator = torch.Generator().manual_seed(0)
    alpha_R = (torch.randint(1, 64, (5000,), generator=generator) / 128).float()
    width_R, share_R = torch.full((5000,), 128.0, dtype=torch.float64), torch.full((5000,), 1 / 5000)
    sparsity = float(alpha_R.double().mean()) + 1 / 16
    found_R = gpu_rates.pruned_ranks(alpha_R, width_R, share_R, sparsity)
    assert ((found_R - 128 * (alpha_R + 1 / 16)).abs() <= 1).all()


# Clipping


@st.composite
def clippings(draw):
    """A weight with its clipping at random logits, and a gradient."""
    size, groups, rows = draw(st.sampled_from([1, 5, 32, 37])), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    w_OI, gradient_OI = torch.randn(2, rows, size * groups, generator=generator).to(dtype)
    if draw(st.booleans()):
        w_OI[0] = 0  # steps at their smallest
    if draw(st.booleans()):
        w_OI[-1] = -w_OI[-1].abs()
    clipping = Clipping(w_OI, groups, draw(st.sampled_from([2, 4, 8])), draw(st.booleans()), learned=True)
    with torch.no_grad():
        clipping.logits_2OG.copy_(torch.randn(clipping.logits_2OG.shape, generator=generator) + 2)
        if draw(st.booleans()):
            clipping.logits_2OG[1] = clipping.logits_2OG[0]
    return clipping, gradient_OI


@given(clippings())
@settings(deadline=None)
def test_the_gradient_in_closed_form_has_the_bits_of_autograd(case):
    clipping, gradient_OI = case
    _, logits_2OG, *others = fields(clipping)
    logits_2OG.requires_grad_()
    found = clipped_grid(logits_2OG, *others)
    with torch.no_grad():
        slope_OG = step_gradient(gradient_OI, clipping.w_OI, found)
    found.step_OG.backward(slope_OG)
    closed_2OG = kernels.clipping_gradient(gradient_OI, clipping)
    moving_OG = found.step_OG > SMALLEST
    assert torch.equal(closed_2OG[:, moving_OG], logits_2OG.grad[:, moving_OG])
    assert not closed_2OG[:, ~moving_OG].any()


@given(clippings(), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_triton_quantises_alike(case, seed):
    """To the bit, at γ of ½ and 1, which every sigmoid gives exactly. The interpreter cuts bfloat16 off."""
    clipping, _ = case
    halves = torch.rand(clipping.logits_2OG.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    with torch.no_grad():
        clipping.logits_2OG.copy_(torch.where(halves, 0, torch.inf))
    for dtype in DTYPES:
        expected_OI, found_OI = torch.full((2, *clipping.w_OI.shape), torch.nan, dtype=dtype)
        reference.quantized(*fields(clipping), expected_OI)
        gpu_clipping.quantized(*fields(clipping), found_OI)
        rtol = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
        torch.testing.assert_close(found_OI, expected_OI, rtol=rtol, atol=0)


@given(clippings())
@settings(deadline=None, max_examples=40)
def test_triton_finds_the_same_gradient_of_clipping(case):
    clipping, gradient_OI = case
    expected_2OG = reference.clipping_gradient(gradient_OI, *fields(clipping))
    found_2OG = gpu_clipping.clipping_gradient(gradient_OI, *fields(clipping))
    torch.testing.assert_close(found_2OG, expected_2OG, rtol=1e-3, atol=1e-4)


def test_triton_takes_groups_wider_than_a_tile():
    generator = torch.Generator().manual_seed(0)
    w_OI, gradient_OI = torch.randn(2, 3, 2500, generator=generator)
    clipping = Clipping(w_OI, 1, 4, False, learned=True)
    torch.testing.assert_close(
        gpu_clipping.clipping_gradient(gradient_OI, *fields(clipping)),
        reference.clipping_gradient(gradient_OI, *fields(clipping)),
        rtol=1e-3,
        atol=1e-3,
    )
    with torch.no_grad():
        clipping.logits_2OG.zero_()
    expected_OI, found_OI = torch.full((2, 3, 2500), torch.nan)
    reference.quantized(*fields(clipping), expected_OI)
    gpu_clipping.quantized(*fields(clipping), found_OI)
    assert torch.equal(found_OI, expected_OI)


# SparseGPT's columns


def as_it_is(x_OI):
    return x_OI


def transposed(x_OI):
    """The same numbers, column by column in memory, as of a Cholesky factor or of weights that a family transposes."""
    return x_OI.T.contiguous().T


@pytest.mark.parametrize("laid", [as_it_is, transposed])
@pytest.mark.parametrize(("rows", "columns", "left"), [(1, 1, 0), (5, 4, 3), (70, 37, 0), (3, 130, 7)])
def test_triton_sweeps_alike(rows, columns, left, laid):
    generator = torch.Generator().manual_seed(columns)
    whole_OI = torch.randn(rows, left + columns + 2, generator=generator)
    factor_II = torch.randn(left + columns + 2, left + columns + 2, generator=generator).triu() / 8
    factor_II.diagonal().abs_().add_(0.5)
    part = slice(left, left + columns)
    kept_OI = torch.rand(whole_OI.shape, generator=generator) < 0.5
    results = []
    for module in (reference, gpu_sweep):
        w_OI, error_OB = laid(whole_OI).clone(), laid(torch.full((rows, columns), torch.nan))
        module.swept(w_OI[:, part], laid(kept_OI)[:, part], laid(factor_II)[part, part], error_OB)
        results.append((w_OI, error_OB))
    (expected_OI, expected_OB), (found_OI, found_OB) = results
    torch.testing.assert_close(found_OI, expected_OI, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_OB, expected_OB, rtol=1e-4, atol=1e-4)
    assert torch.equal(found_OI[:, :left], whole_OI[:, :left])
    assert torch.equal(found_OI[:, part] == 0, ~kept_OI[:, part])


def test_rows_that_registers_do_not_hold_are_swept_by_torch(monkeypatch):
    monkeypatch.setattr(gpu_sweep, "WIDEST", 3)
    w_OI, error_OI = torch.ones(2, 4), torch.empty(2, 4)
    gpu_sweep.swept(w_OI, torch.tensor([[True, False, True, True]] * 2), torch.eye(4) * 2, error_OI)
    assert w_OI.tolist() == [[1, 0, 1, 1]] * 2
    assert error_OI.tolist() == [[0, 0.5, 0, 0]] * 2


# Statistics


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "channels"), [(1, 1), (3, 37), (300, 130), (600, 5)])
def test_triton_adds_the_same_squares(dtype, tokens, channels):
    generator = torch.Generator().manual_seed(tokens)
    x_TI = torch.randn(tokens, channels, generator=generator).to(dtype)
    squares_I = torch.rand(channels, dtype=torch.float64, generator=generator)
    exact_I = squares_I + x_TI.double().square().sum(dim=0)
    for module in (reference, gpu_statistics):
        found_I = squares_I.clone()
        module.add_squares(x_TI, found_I)
        torch.testing.assert_close(found_I, exact_I, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 37), (2, 3000)])
def test_histograms_count_what_is_below_the_bins(dtype, shape):
    values = torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = [int((values == value).sum()) for value in range(200)]
    assert kernels.histogram(values, 200).tolist() == expected
    assert gpu_statistics.histogram(values, 200).tolist() == expected
    assert reference.histogram(values.to(DEVICE), 200).cpu().tolist() == expected
