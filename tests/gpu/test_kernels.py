"""The operators on the device against plain torch on the CPU: every dtype, shapes of real models and odd ones."""

import pytest
import torch

from besa import kernels
from besa.kernels import reference
from besa.methods.apportioning import apportion
from besa.quantization import Clipping

SHAPES = [(1, 1), (3, 37), (5, 577), (64, 4096), (7, 11008), (3, 28672)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ranks_of(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return numbers(rows, columns, seed=1).argsort(dim=1).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [torch.int16, torch.int32])
def test_masked_and_binned(device, shape, dtype, ranks):
    rows, columns = shape
    w_OI, gradient_OI = numbers(rows, columns).to(dtype), numbers(rows, columns, seed=2).to(dtype)
    ranks_OI = ranks_of(rows, columns, ranks)
    counts_O = torch.linspace(0, columns, rows).long()
    out_OI = torch.empty_like(w_OI, device=device)
    kernels.masked(w_OI.to(device), ranks_OI.to(device), counts_O.to(device), out_OI)
    assert torch.equal(out_OI.cpu(), torch.where(ranks_OI >= counts_O[:, None], w_OI, 0))

    bins_I = (torch.arange(columns) * 101 // columns).to(torch.int16)
    sums_OB = torch.empty(rows, 101, device=device)
    kernels.binned(gradient_OI.to(device), w_OI.to(device), ranks_OI.to(device), bins_I.to(device), sums_OB)
    products_OI = gradient_OI.double() * w_OI.double()
    where_OI = bins_I.long()[ranks_OI.long()]
    exact_OB = torch.zeros(rows, 101, dtype=torch.float64).scatter_add_(1, where_OI, products_OI)
    size_OB = torch.zeros(rows, 101, dtype=torch.float64).scatter_add_(1, where_OI, products_OI.abs())
    assert ((sums_OB.cpu() - exact_OB).abs() <= 2**-18 * size_OB + 1e-30).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_weights_as_a_vector(device, shape, dtype):
    w_OI, x_OI = (numbers(*shape, seed=seed).to(dtype) for seed in (0, 2))
    w_OI[numbers(*shape, seed=3) < 0] = 0
    kept_K = numbers(int((w_OI != 0).sum()), seed=4)
    spread_OI = torch.empty_like(w_OI, device=device)
    kernels.spread(w_OI.to(device), kept_K.to(device), spread_OI)
    assert torch.equal(spread_OI.cpu(), torch.zeros_like(w_OI).masked_scatter_(w_OI != 0, kept_K.to(dtype)))
    gathered_K = torch.empty_like(kept_K, device=device)
    kernels.gathered(w_OI.to(device), x_OI.to(device), gathered_K)
    assert torch.equal(gathered_K.cpu(), x_OI[w_OI != 0].float())


@pytest.mark.parametrize("groups", [1, 7, 42_496])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_pruned_ranks(device, groups, sparsity):
    alpha_R = (numbers(groups) * 0.1 + sparsity).clamp(0, 1)
    width_R = torch.randint(1, 12_000, (groups,), generator=torch.Generator().manual_seed(0)).double()
    share_R = (width_R / width_R.sum()).float()
    found_R = kernels.pruned_ranks(alpha_R.to(device), width_R.to(device), share_R.to(device), sparsity).cpu()
    off_R = (found_R - reference.pruned_ranks(alpha_R, width_R, share_R, sparsity)).abs()
    assert off_R.max() <= 1  # the shift of all rates is found by sums in another order
    assert (off_R > 0).float().mean() <= 0.1


@pytest.mark.parametrize("rows", [1, 7, 42_496])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.93])
def test_zeros_are_apportioned_exactly(device, rows, sparsity):
    rates_R = (numbers(rows) * 0.1 + sparsity).double()
    widths_R = torch.randint(1, 12_000, (rows,), generator=torch.Generator().manual_seed(0))
    least_R, total = torch.zeros_like(widths_R), int(sparsity * int(widths_R.sum()))
    found_R = apportion(rates_R.to(device), widths_R.to(device), total, least_R.to(device)).cpu()
    assert int(found_R.sum()) == total
    assert (found_R - apportion(rates_R, widths_R, total, least_R)).abs().max() <= 1  # ties of float64


@pytest.mark.parametrize("shape", [(3, 37), (5, 4096), (2, 11008)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (8, False), (2, True)])
def test_quantisation(device, shape, dtype, bits, symmetric):
    rows, columns = shape
    w_OI, gradient_OI = numbers(rows, columns).to(dtype), numbers(rows, columns, seed=2).to(dtype)
    for groups in {1, max(1, columns // 128)} if columns % 128 == 0 else {1}:
        there, here = (Clipping(w.clone(), groups, bits, symmetric, True) for w in (w_OI.to(device), w_OI))
        found_OI, exact_OI = torch.empty_like(w_OI, device=device), torch.empty_like(w_OI)
        with torch.no_grad():
            kernels.quantized(there, found_OI)
            kernels.quantized(here, exact_OI)
            slopes = kernels.clipping_gradient(gradient_OI.to(device), there).cpu()
            expected = kernels.clipping_gradient(gradient_OI, here)
        off_OI = (found_OI.cpu().float() - exact_OI.float()).abs()
        step_OG = (here.high_OG - here.low_OG) / (2**bits - 1) * (2 if symmetric else 1)
        assert off_OI.max() <= 1.1 * step_OG.max()  # halves may round to either side
        assert (off_OI > 2**-8 * step_OG.max()).float().mean() <= 2e-3
        torch.testing.assert_close(slopes, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("transposed", [False, True])  # as of a Cholesky factor, and of weights that lie transposed
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (37, 128), (4096, 128), (129, 61)])
def test_sweep(device, rows, columns, transposed):
    block_OB, kept_OB = numbers(rows, columns), numbers(rows, columns, seed=1) > 0
    factor_BB = (numbers(columns, columns, seed=2) * 0.02 + torch.eye(columns)).triu().contiguous()
    if transposed:
        block_OB, kept_OB, factor_BB = (each.T.contiguous().T for each in (block_OB, kept_OB, factor_BB))
    found, expected = [block_OB.to(device), torch.zeros(rows, columns, device=device)], [block_OB.clone()]
    expected += [torch.zeros(rows, columns)]
    kernels.swept(found[0], kept_OB.to(device), factor_BB.to(device), found[1])
    reference.swept(expected[0], kept_OB, factor_BB, expected[1])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    assert not found[0].cpu()[~kept_OB].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (77, 577), (2048, 11008)])
def test_squares_of_inputs(device, dtype, tokens, columns):
    x_TI = numbers(tokens, columns).to(dtype)
    squares_I = torch.ones(columns, dtype=torch.float64).to(device)
    kernels.add_squares(x_TI.to(device), squares_I)
    torch.testing.assert_close(squares_I.cpu(), 1 + x_TI.double().square().sum(dim=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_histogram(device, size):
    values = torch.randint(0, 900, (size,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(kernels.histogram(values.to(device), 700).cpu(), torch.bincount(values, minlength=900)[:700])
