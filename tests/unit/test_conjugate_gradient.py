"""Conjugate gradient on a fixed mask against least squares solved row by row, and what it must never do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from besa.counting.masks import hard_mask, rank
from besa.methods.reconstruction import ConjugateGradient, NoReconstruction
from besa.observing.input_statistics import InputStatistics


def gathered(x_TI) -> InputStatistics:
    statistics = InputStatistics.empty(x_TI.shape[1], True, x_TI.device)
    statistics.add(x_TI)
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


def slowly(w_OI, kept_OI, x_TI, damping):
    """The kept weights of each row by stacked least squares: the output, and the distance from the dense weight."""
    x_TI, w_OI = x_TI.double(), w_OI.double()
    diagonal_I = x_TI.square().sum(dim=0)
    dead_I = (diagonal_I == 0).double()
    pull_I = (dead_I + damping * (diagonal_I + dead_I).mean()).sqrt()
    solved_OI = torch.zeros_like(w_OI)
    for row, (w_I, kept_I) in enumerate(zip(w_OI, kept_OI, strict=True)):
        system = torch.cat([x_TI, pull_I.diag()])[:, kept_I]
        wanted = torch.cat([x_TI @ w_I, pull_I * w_I])
        if kept_I.any():
            solved_OI[row, kept_I] = torch.linalg.lstsq(system, wanted[:, None]).solution[:, 0]
    return solved_OI


@given(problem=problems(), damping=st.sampled_from([0.01, 0.2]))
@settings(max_examples=40, deadline=None)
def test_it_ends_at_the_least_squares_solution(problem, damping):
    w_OI, x_TI, counts_O = problem
    ranks_OI = rank(w_OI.abs(), w_OI)
    kept_OI = hard_mask(ranks_OI, counts_O)
    method = ConjugateGradient(iterations=60, damping=damping)
    rebuilt_OI = method.rebuild(w_OI, ranks_OI, counts_O, gathered(x_TI))
    expected_OI = slowly(w_OI, kept_OI, x_TI, damping)
    torch.testing.assert_close(rebuilt_OI.double(), expected_OI, rtol=1e-3, atol=1e-3)
    assert torch.equal(rebuilt_OI != 0, kept_OI)


@given(problem=problems(), iterations=st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_no_row_is_worse_than_no_reconstruction(problem, iterations):
    w_OI, x_TI, counts_O = problem
    ranks_OI = rank(w_OI.abs(), w_OI)
    statistics = gathered(x_TI)
    rebuilt_OI = ConjugateGradient(iterations=iterations, damping=1e-4).rebuild(w_OI, ranks_OI, counts_O, statistics)
    frozen_OI = NoReconstruction().rebuild(w_OI, ranks_OI, counts_O, statistics)
    target_OT = w_OI @ x_TI.T
    error_O, before_O = ((weight @ x_TI.T - target_OT).square().sum(dim=1) for weight in (rebuilt_OI, frozen_OI))
    assert (error_O <= before_O * 1.001 + 1e-3).all()


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
    rebuilt_OI = ConjugateGradient(damping=1e-9).rebuild(
        w_OI, torch.tensor([[0, 1]]), torch.tensor([1]), gathered(x_TI)
    )
    assert abs(float(rebuilt_OI[0, 1])) < 1e-6
    assert (rebuilt_OI == 0).tolist() == [[True, False]]
