"""SparseGPT's solver against optimal brain surgeon done slowly: row by row, with an inverse for every weight."""

import pytest
import torch

from besa.counting.masks import hard_mask, rank
from besa.errors import BesaError
from besa.methods.importance import OBS
from besa.methods.reconstruction import ADMM, NoReconstruction, OBSUpdate
from besa.methods.reconstruction.obs_update import blocks_of, inverse_factor, rows_compete, sweep
from besa.observing.input_statistics import InputStatistics

ROWS, WIDTH, TOKENS = 6, 24, 120
SPARSEGPT = {"damping": 0.01}


def gathered(x_TI) -> InputStatistics:
    statistics = InputStatistics.empty(x_TI.shape[1], True, x_TI.device)
    statistics.add(x_TI)
    return statistics


@pytest.fixture
def w_OI():
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def x_TI():
    """Correlated inputs with a channel that is always zero."""
    generator = torch.Generator().manual_seed(1)
    x_TI = torch.randn(TOKENS, WIDTH, generator=generator)
    x_TI += x_TI @ torch.randn(WIDTH, WIDTH, generator=generator) / 3
    x_TI[:, 5] = 0
    return x_TI


@pytest.fixture
def counts_O():
    return torch.tensor([12, 12, 7, 0, 24, 17])


def damped_hessian(x_TI, damping):
    hessian_II = x_TI.double().T @ x_TI.double()
    diagonal_I = hessian_II.diagonal()
    diagonal_I[diagonal_I == 0] = 1
    return hessian_II + damping * diagonal_I.mean() * torch.eye(len(hessian_II), dtype=torch.float64)


def remove(w_I, j, hessian_II):
    """Take weight j out; those to its right move to where the error of the output is least."""
    inverse = torch.linalg.inv(hessian_II[j:, j:])  # Gaussian elimination, anew for every weight
    w_I[j:] -= w_I[j] / inverse[0, 0] * inverse[0]
    w_I[j] = 0


def slowly_with_a_mask(w_OI, kept_OI, hessian_II):
    w_OI = w_OI.double()
    for w_I, kept_I in zip(w_OI, kept_OI, strict=True):
        for j in range(len(w_I)):
            if not kept_I[j]:
                remove(w_I, j, hessian_II)
    return w_OI


def slowly_choosing_the_mask(w_OI, zeros, hessian_II, columns, dead_I):
    """Block by block the weights whose removal costs least go, as many in every block; dead ones cost nothing."""
    w_OI = w_OI.double()
    width = w_OI.shape[1]
    for start in range(0, width, columns):
        cost_OB = torch.stack(
            [w_OI[:, j].square() / torch.linalg.inv(hessian_II[j:, j:])[0, 0] for j in range(start, start + columns)],
            dim=1,
        )
        cost_OB[:, dead_I[start : start + columns]] = 0
        kept_OB = torch.ones_like(cost_OB, dtype=torch.bool)
        kept_OB.view(-1)[cost_OB.view(-1).argsort(stable=True)[: zeros * columns // width]] = False
        for w_I, kept_B in zip(w_OI, kept_OB, strict=True):
            for j in range(columns):
                if not kept_B[j]:
                    remove(w_I, start + j, hessian_II)
    return w_OI


def output_error(w_OI, rebuilt_OI, x_TI) -> float:
    return float((x_TI @ (w_OI - rebuilt_OI).T).square().sum())


# No reconstruction


def test_no_reconstruction_keeps_what_it_does_not_prune(w_OI, counts_O):
    ranks_OI = rank(w_OI.abs(), w_OI)
    for dtype in (torch.float32, torch.bfloat16):
        rebuilt_OI = NoReconstruction().rebuild(w_OI.to(dtype), ranks_OI, counts_O, statistics=None)
        assert rebuilt_OI.dtype == dtype
        for w_I, rebuilt_I, count in zip(w_OI.to(dtype).tolist(), rebuilt_OI.tolist(), counts_O.tolist(), strict=True):
            lowest = sorted(abs(w) for w in w_I)[:count]
            assert rebuilt_I == [0 if abs(w) in lowest else w for w in w_I]


def test_no_reconstruction_does_not_let_infinity_through():
    """A mask that multiplies would make NaN of it."""
    w_OI = torch.tensor([[torch.inf, 1.0]])
    rebuilt_OI = NoReconstruction().rebuild(w_OI, torch.tensor([[0, 1]]), torch.tensor([1]), statistics=None)
    assert rebuilt_OI.tolist() == [[0, 1]]


# Optimal brain surgeon


def test_inverse_factor_is_the_triangle_whose_square_is_the_inverse(x_TI):
    factor_II = inverse_factor(gathered(x_TI).inverse_hessian(0.01))
    assert torch.equal(factor_II, factor_II.triu())
    inverse_II = torch.linalg.inv(damped_hessian(x_TI, 0.01))
    torch.testing.assert_close((factor_II.T @ factor_II).double(), inverse_II, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 5, 8, 24, 128])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_a_fixed_mask_is_solved_as_slowly_by_hand(w_OI, x_TI, counts_O, columns, damping):
    ranks_OI = rank(w_OI.abs(), w_OI)
    update = OBSUpdate(mask="fixed", columns=columns, damping=damping)
    before_OI = w_OI.clone()
    rebuilt_OI = update.rebuild(w_OI, ranks_OI, counts_O, gathered(x_TI))
    assert torch.equal(w_OI, before_OI)
    kept_OI = hard_mask(ranks_OI, counts_O)
    expected_OI = slowly_with_a_mask(w_OI, kept_OI, damped_hessian(x_TI, damping))
    torch.testing.assert_close(rebuilt_OI.double(), expected_OI, rtol=1e-4, atol=1e-4)
    assert torch.equal(rebuilt_OI != 0, kept_OI)
    assert not torch.allclose(rebuilt_OI[kept_OI], w_OI[kept_OI], atol=1e-2)  # the kept weights did move
    assert torch.equal(rebuilt_OI[3], w_OI[3])  # but not in a row that loses none


@pytest.mark.parametrize("columns", [1, 4, 8, 24, 128])
def test_an_adaptive_mask_is_chosen_as_slowly_by_hand(w_OI, x_TI, counts_O, columns):
    counts_O = counts_O.roll(2)  # 72 zeros, of which only the sum counts
    rebuilt_OI = OBSUpdate(**SPARSEGPT, mask="adaptive", columns=columns).rebuild(
        w_OI, rank(w_OI.abs(), w_OI), counts_O, gathered(x_TI)
    )
    dead_I = torch.arange(WIDTH) == 5
    expected_OI = slowly_choosing_the_mask(w_OI, 72, damped_hessian(x_TI, 0.01), min(columns, WIDTH), dead_I)
    assert torch.equal(rebuilt_OI == 0, expected_OI == 0)
    torch.testing.assert_close(rebuilt_OI.double(), expected_OI, rtol=1e-4, atol=1e-4)
    for block_OB in rebuilt_OI.split(columns, dim=1):
        assert int((block_OB == 0).sum()) == 72 * block_OB.shape[1] // WIDTH


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("method", ["sparsegpt", "obs", "admm"])
def test_weights_of_dead_channels_go_first(method, scale):
    """A third of the channels never fires, as after a ReLU: however small the others, none of their weights goes."""
    generator = torch.Generator().manual_seed(3)
    w_OI = torch.randn(16, 48, generator=generator)
    x_TI = scale * torch.randn(200, 48, generator=generator).relu()
    x_TI[:, ::3] = 0
    statistics, counts_O = InputStatistics.empty(48, True, x_TI.device), torch.full((16,), 16)
    statistics.add(x_TI, [False, False, False, True])
    ranks_OI = rank(OBS().score(w_OI, statistics) if method == "obs" else w_OI.abs(), w_OI)
    rebuilder = {"sparsegpt": OBSUpdate(**SPARSEGPT, mask="adaptive"), "obs": NoReconstruction(), "admm": ADMM()}
    rebuilt_OI = rebuilder[method].rebuild(w_OI, ranks_OI, counts_O, statistics)
    assert (rebuilt_OI[:, ::3] == 0).all()
    torch.testing.assert_close(rebuilt_OI[:, 1::3], w_OI[:, 1::3])


def test_a_pattern_holds_where_a_whole_group_is_dead(w_OI, x_TI):
    w_OI, counts_O = w_OI.clone(), torch.full((ROWS,), WIDTH // 2)
    w_OI[:, 8:12] = 0
    rebuilt_OI = OBSUpdate(**SPARSEGPT, mask="adaptive").rebuild(
        w_OI, rank(w_OI.abs(), w_OI, 4), counts_O, gathered(x_TI), 4
    )
    zeros_OG = (rebuilt_OI == 0).unflatten(1, (-1, 4)).sum(dim=2)
    assert zeros_OG.tolist() == [[2] * 6] * ROWS  # those of the dead group that are kept make up for others


@pytest.mark.parametrize("columns", [7, 128])
@pytest.mark.parametrize("zeros", [0, 1, 71, 143, 144])
def test_an_adaptive_mask_has_the_zeros_it_was_given(w_OI, x_TI, columns, zeros):
    counts_O = torch.tensor([min(WIDTH, max(0, zeros - o * WIDTH)) for o in range(ROWS)])
    rebuilt_OI = OBSUpdate(**SPARSEGPT, mask="adaptive", columns=columns).rebuild(
        w_OI, rank(w_OI.abs(), w_OI), counts_O, gathered(x_TI)
    )
    assert int((rebuilt_OI == 0).sum()) == zeros
    if zeros == 0:
        assert torch.equal(rebuilt_OI, w_OI)


@pytest.mark.parametrize("mask", ["adaptive", "fixed"])
@pytest.mark.parametrize("columns", [1, 6, 128])
def test_zeros_stay_zero(w_OI, x_TI, mask, columns):
    """Also where weights to the left moved them, and where a block of columns holds more than its share already."""
    zero_OI = torch.rand(w_OI.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    zero_OI[:, 18:] = True
    w_OI = w_OI.masked_fill(zero_OI, 0)
    counts_O = zero_OI.sum(dim=1) + torch.tensor([1, 2, 3, 4, 5, 0])
    rebuilt_OI = OBSUpdate(**SPARSEGPT, mask=mask, columns=columns).rebuild(
        w_OI, rank(w_OI.abs(), w_OI), counts_O, gathered(x_TI)
    )
    assert (rebuilt_OI[zero_OI] == 0).all()
    assert int((rebuilt_OI == 0).sum()) == int(counts_O.sum())


def test_zeros_that_are_there_already_keep_the_rest_as_it_is(w_OI, x_TI):
    w_OI[:, ::2] = 0
    counts_O = torch.full((ROWS,), WIDTH // 2)
    for mask in ("adaptive", "fixed"):
        rebuilt_OI = OBSUpdate(**SPARSEGPT, mask=mask).rebuild(w_OI, rank(w_OI.abs(), w_OI), counts_O, gathered(x_TI))
        assert torch.equal(rebuilt_OI, w_OI)


@pytest.mark.parametrize("columns", [6, 128])
def test_moving_the_kept_weights_lowers_the_error(w_OI, x_TI, columns):
    ranks_OI, counts_O = rank(w_OI.abs(), w_OI), torch.full((ROWS,), WIDTH // 2)
    frozen_OI = NoReconstruction().rebuild(w_OI, ranks_OI, counts_O, gathered(x_TI))
    fixed_OI = OBSUpdate(**SPARSEGPT, mask="fixed", columns=columns).rebuild(w_OI, ranks_OI, counts_O, gathered(x_TI))
    adaptive_OI = OBSUpdate(**SPARSEGPT, mask="adaptive", columns=columns).rebuild(
        w_OI, ranks_OI, counts_O, gathered(x_TI)
    )
    assert output_error(w_OI, fixed_OI, x_TI) < 0.95 * output_error(w_OI, frozen_OI, x_TI)
    assert output_error(w_OI, adaptive_OI, x_TI) < output_error(w_OI, fixed_OI, x_TI)


def test_independent_channels_have_nothing_to_make_up(w_OI):
    """With a diagonal Hessian the kept weights stay, and the adaptive mask is that of w²·‖x‖²."""
    x_TI = torch.diag(torch.linspace(0.5, 2, WIDTH))
    zeros = ROWS * WIDTH // 2
    rebuilt_OI = OBSUpdate(mask="adaptive", damping=1e-6).rebuild(
        w_OI, rank(w_OI.abs(), w_OI), torch.full((ROWS,), WIDTH // 2), gathered(x_TI)
    )
    score_OI = (w_OI * x_TI.diagonal()).abs()
    kept_OI = score_OI > score_OI.flatten().sort().values[zeros - 1]
    torch.testing.assert_close(rebuilt_OI, w_OI * kept_OI, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", ["adaptive", "fixed"])
def test_without_tokens_kept_weights_stay(w_OI, mask):
    ranks_OI, counts_O = rank(w_OI.abs(), w_OI), torch.full((ROWS,), WIDTH // 2)
    nothing = InputStatistics.empty(WIDTH, True, w_OI.device)
    rebuilt_OI = OBSUpdate(**SPARSEGPT, mask=mask).rebuild(w_OI, ranks_OI, counts_O, nothing)
    smallest = w_OI.abs().flatten().sort().values[ROWS * WIDTH // 2 - 1]
    kept_OI = hard_mask(ranks_OI, counts_O) if mask == "fixed" else w_OI.abs() > smallest
    torch.testing.assert_close(rebuilt_OI, w_OI * kept_OI)


def test_columns_of_different_width_share_the_zeros(w_OI, x_TI):
    """24 columns in blocks of 10, 10 and 4."""
    factor_II = inverse_factor(gathered(x_TI).inverse_hessian(0.01))
    blocks, dead_I = blocks_of(WIDTH, 10), torch.zeros(WIDTH, dtype=torch.bool)
    swept_OI = sweep(w_OI, factor_II, blocks, rows_compete(w_OI == 0, dead_I, blocks, torch.tensor(72)))
    assert [int((part == 0).sum()) for part in swept_OI.split(10, dim=1)] == [30, 30, 12]


@pytest.mark.parametrize("mask", ["adaptive", "fixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_stay_so(w_OI, x_TI, counts_O, mask, dtype):
    w_OI = w_OI.to(dtype)
    ranks_OI = rank(w_OI.float().abs(), w_OI)
    update = OBSUpdate(**SPARSEGPT, mask=mask, columns=8)
    rebuilt_OI = update.rebuild(w_OI, ranks_OI, counts_O, gathered(x_TI))
    assert rebuilt_OI.dtype == dtype
    assert int((rebuilt_OI == 0).sum()) == int(counts_O.sum())
    assert torch.equal(rebuilt_OI, update.rebuild(w_OI.float(), ranks_OI, counts_O, gathered(x_TI)).to(dtype))


@pytest.mark.parametrize("mask", ["adaptive", "fixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_kept_weight_that_the_update_lands_on_zero_adds_no_zero(mask, dtype):
    """Removing 1 moves the other by ½, to a value too small for the dtype: one zero was asked for, not two."""
    x_TI = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    w_OI = torch.tensor([[1.0, -0.5]], dtype=dtype)
    ranks_OI = torch.tensor([[0, 1]])
    rebuilt_OI = OBSUpdate(mask=mask, damping=1e-8).rebuild(w_OI, ranks_OI, torch.tensor([1]), gathered(x_TI))
    assert abs(float(rebuilt_OI[0, 1])) < 1e-4
    assert int((rebuilt_OI == 0).sum()) == 1


def test_a_hessian_that_cannot_be_inverted_is_refused(w_OI, counts_O):
    statistics = gathered(torch.full((3, WIDTH), torch.nan))
    with pytest.raises(BesaError, match="not positive definite"):
        OBSUpdate(**SPARSEGPT).rebuild(w_OI, rank(w_OI.abs(), w_OI), counts_O, statistics)
