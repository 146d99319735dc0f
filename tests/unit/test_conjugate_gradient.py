"""Conjugate gradient on a fixed mask against least squares solved row by row, and what it must never do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from besa.counting.masks import hard_mask, rank
from besa.methods.reconstruction import ADMM, ConjugateGradient, NoReconstruction, OBSUpdate
from besa.methods.reconstruction.ridge import RIDGES, best_ridge, solve, with_ridge
from besa.methods.reconstruction.written import written
from besa.observing.input_statistics import InputStatistics

FIXED = OBSUpdate(mask="fixed")


def gathered(x_TI, held_TI=None) -> InputStatistics:
    """Statistics to solve for `x_TI`, and to judge by `held_TI`; by default the same."""
    statistics = InputStatistics.empty(x_TI.shape[1], True, x_TI.device)
    statistics.add(x_TI)
    statistics.add(x_TI if held_TI is None else held_TI, [True])
    return statistics


def correlated(tokens, width, generator):
    x_TI = torch.randn(tokens, width, generator=generator)
    return x_TI + x_TI @ torch.randn(width, width, generator=generator) / 3


@st.composite
def problems(draw):
    """A weight, tokens, and how many weights of each row go."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    rows, width = draw(st.integers(1, 5)), draw(st.integers(2, 12))
    w_OI = torch.randn(rows, width, generator=generator)
    x_TI = correlated(6 * width, width, generator)
    if draw(st.booleans()):
        x_TI[:, draw(st.integers(0, width - 1))] = 0
    counts_O = torch.randint(0, width + 1, (rows,), generator=generator)
    return w_OI, x_TI, counts_O


def slowly(w_OI, kept_OI, x_TI, ridge):
    """The kept weights of each row by stacked least squares: the output, and the distance from the dense weight."""
    x_TI, w_OI = x_TI.double(), w_OI.double()
    diagonal_I = x_TI.square().sum(dim=0)
    pull_I = (ridge * diagonal_I + (diagonal_I == 0)).sqrt()
    solved_OI = torch.zeros_like(w_OI)
    for row, (w_I, kept_I) in enumerate(zip(w_OI, kept_OI, strict=True)):
        system = torch.cat([x_TI, pull_I.diag()])[:, kept_I]
        wanted = torch.cat([x_TI @ w_I, pull_I * w_I])
        if kept_I.any():
            solved_OI[row, kept_I] = torch.linalg.lstsq(system, wanted[:, None]).solution[:, 0]
    return solved_OI


@given(problem=problems(), ridge=st.sampled_from([0.01, 0.2, 3.0]), started=st.booleans())
@settings(max_examples=40, deadline=None)
def test_it_ends_at_the_least_squares_solution(problem, ridge, started):
    w_OI, x_TI, counts_O = problem
    kept_OI = hard_mask(rank(w_OI.abs(), w_OI), counts_O)
    hessian_II = with_ridge(gathered(x_TI), torch.tensor(ridge))
    start_OI = torch.ones_like(w_OI) * kept_OI if started else None
    solved_OI = solve(w_OI, kept_OI, hessian_II, 60, start_OI)
    torch.testing.assert_close(solved_OI.double(), slowly(w_OI, kept_OI, x_TI, ridge), rtol=1e-3, atol=1e-3)


@given(problem=problems(), other=st.integers(0, 10**6), iterations=st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_it_is_never_worse_than_no_reconstruction_on_held_out_tokens(problem, other, iterations):
    """Held-out tokens of another kind: where what helps on the ones harms on the others, weights stay."""
    w_OI, x_TI, counts_O = problem
    held_TI = correlated(30, w_OI.shape[1], torch.Generator().manual_seed(other))
    ranks_OI, statistics = rank(w_OI.abs(), w_OI), gathered(x_TI, held_TI)
    frozen_OI = NoReconstruction().rebuild(w_OI, ranks_OI, counts_O, statistics)
    for method in (ConjugateGradient(iterations=iterations), ADMM(iterations=iterations), OBSUpdate(), FIXED):
        rebuilt_OI = method.rebuild(w_OI, ranks_OI, counts_O, statistics)
        error, before = (float(((weight - w_OI) @ held_TI.T).square().sum()) for weight in (rebuilt_OI, frozen_OI))
        assert error <= before * 1.001 + 1e-3
        assert int((rebuilt_OI == 0).sum()) == int(counts_O.sum())


def test_the_ridge_is_the_one_that_held_out_tokens_like_best():
    generator = torch.Generator().manual_seed(5)
    w_OI, mixing_II = torch.randn(8, 24, generator=generator), torch.randn(24, 24, generator=generator) / 3
    x_TI, held_TI = (torch.randn(n, 24, generator=generator) @ (mixing_II + torch.eye(24)) for n in (30, 200))
    statistics, kept_OI = gathered(x_TI, held_TI), w_OI.abs() > w_OI.abs().median()
    errors = {
        ridge: float(((slowly(w_OI, kept_OI, x_TI, ridge) - w_OI) @ held_TI.double().T).square().sum())
        for ridge in RIDGES
    }
    best = min(errors.values())
    assert best not in (errors[RIDGES[0]], errors[RIDGES[-1]])  # too weak overfits, too strong does nothing
    chosen = float(best_ridge(w_OI, kept_OI, statistics))
    assert errors[min(RIDGES, key=lambda ridge: abs(ridge - chosen))] <= 1.02 * best  # few steps tell them apart


def test_massive_activations_do_not_rule_the_ridge():
    """A channel a thousand times as large leaves the solution of the others as it is."""
    generator = torch.Generator().manual_seed(6)
    w_OI, x_TI = torch.randn(4, 12, generator=generator), correlated(100, 12, generator)
    kept_OI = hard_mask(rank(w_OI.abs(), w_OI), torch.full((4,), 6))
    scale_I = torch.ones(12)
    scale_I[3] = 1000
    plain, massive = (
        solve(w_OI / scale, kept_OI, with_ridge(gathered(x_TI * scale), torch.tensor(0.2)), 60)
        for scale in (torch.ones(12), scale_I)
    )
    torch.testing.assert_close(massive * scale_I, plain, rtol=1e-3, atol=1e-3)


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(3)
    w_OI = torch.randn(6, 24, generator=generator)
    return w_OI, rank(w_OI.abs(), w_OI), torch.tensor([12, 12, 7, 0, 24, 17]), correlated(120, 24, generator)


def test_more_steps_lower_the_error(problem):
    w_OI, ranks_OI, counts_O, x_TI = problem
    methods = [NoReconstruction(), *(ConjugateGradient(iterations=n) for n in (1, 3, 10))]
    moved = [method.rebuild(w_OI, ranks_OI, counts_O, gathered(x_TI)) - w_OI for method in methods]
    errors = [float((x_TI @ moved_OI.T).norm()) for moved_OI in moved]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.96 * errors[0]


def test_without_tokens_kept_weights_stay(problem):
    w_OI, ranks_OI, counts_O, _ = problem
    nothing = InputStatistics.empty(24, True, w_OI.device)
    rebuilt_OI = ConjugateGradient().rebuild(w_OI, ranks_OI, counts_O, nothing)
    torch.testing.assert_close(rebuilt_OI, NoReconstruction().rebuild(w_OI, ranks_OI, counts_O, nothing))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_stay_so(problem, dtype):
    w_OI, ranks_OI, counts_O, x_TI = problem
    w_OI = w_OI.to(dtype)
    before_OI = w_OI.clone()
    rebuilt_OI = ConjugateGradient().rebuild(w_OI, ranks_OI, counts_O, gathered(x_TI))
    assert torch.equal(w_OI, before_OI)
    assert rebuilt_OI.dtype == dtype
    in_full_OI = ConjugateGradient().rebuild(w_OI.float(), ranks_OI, counts_O, gathered(x_TI))
    assert torch.equal(rebuilt_OI, in_full_OI.to(dtype))


def test_a_kept_weight_that_lands_on_zero_adds_no_zero():
    """Both channels are alike, so the first weight, 1, is made up for by the second, which becomes −1 + 1 = 0."""
    x_TI = torch.tensor([[1.0, 1.0]])
    w_OI = torch.tensor([[1.0, -1.0]])
    kept_OI = torch.tensor([[False, True]])
    solved_OI = solve(w_OI, kept_OI, gathered(x_TI).gram_II.float(), 10)
    assert solved_OI.tolist() == [[0, 0]]
    assert (written(solved_OI, kept_OI, torch.float32) == 0).tolist() == [[True, False]]
