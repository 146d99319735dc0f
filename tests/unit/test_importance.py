"""Each importance against the sentence that defines it."""

import math

import pytest
import torch

from besa.errors import BesaError
from besa.methods.importance import OBS, RIA, Magnitude, Wanda
from besa.observing.input_statistics import InputStatistics


def gathered(x_TI, gram=True) -> InputStatistics:
    statistics = InputStatistics.empty(x_TI.shape[1], gram, x_TI.device)
    statistics.add(x_TI)
    return statistics


@pytest.fixture
def w_OI():
    w_OI = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    w_OI[1, 2] = 0
    return w_OI


@pytest.fixture
def x_TI():
    """Correlated channels of different size."""
    generator = torch.Generator().manual_seed(1)
    mixed_TI = torch.randn(40, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    return mixed_TI * torch.tensor([0.1, 1.0, 5.0, 1.0, 2.0, 0.5])


def test_magnitude(w_OI, x_TI):
    assert Magnitude().score(w_OI, gathered(x_TI, gram=False)).tolist() == [
        [abs(w) for w in row] for row in w_OI.tolist()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wanda(w_OI, x_TI, dtype):
    w_OI = w_OI.to(dtype)
    score_OI = Wanda().score(w_OI, gathered(x_TI, gram=False))
    assert score_OI.dtype == torch.float32
    for o in range(4):
        for i in range(6):
            norm = math.sqrt(sum(x**2 for x in x_TI[:, i].tolist()))
            assert float(score_OI[o, i]) == pytest.approx(abs(float(w_OI[o, i])) * norm, rel=1e-5)


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wanda_without_tokens_is_magnitude(w_OI, dtype, gram):
    nothing = InputStatistics.empty(6, gram, w_OI.device)
    score_OI = Wanda().score(w_OI.to(dtype), nothing)
    assert score_OI.dtype == torch.float32
    assert torch.equal(score_OI, w_OI.to(dtype).float().abs())
    nothing.add(torch.zeros(1, 6))
    assert torch.equal(Wanda().score(w_OI, nothing), w_OI.float().abs())  # a token of another expert is all zeros


def test_obs_without_tokens_ranks_as_magnitude_does(w_OI):
    score_OI = OBS(damping=0.5).score(w_OI, InputStatistics.empty(6, True, w_OI.device))
    torch.testing.assert_close(score_OI, 1.5 * w_OI.square())  # every channel counts one, and the damping


@pytest.mark.parametrize("damping", [1e-4, 0.5])
def test_obs_is_the_least_error_that_removing_one_weight_causes(w_OI, x_TI, damping):
    """min over w' with w'_j = 0 of (w − w')ᵀ H (w − w'), solved as least squares: w²/[H⁻¹]ⱼⱼ without a factor of ½."""
    score_OI = OBS(damping=damping).score(w_OI, gathered(x_TI))
    assert score_OI.dtype == torch.float32
    x_TI = x_TI.double()
    ridge = damping * x_TI.square().sum(dim=0).mean()
    rows_RI = torch.cat([x_TI, ridge.sqrt() * torch.eye(6, dtype=torch.float64)])  # ‖rows (w − w')‖² is the damped loss
    for o in range(4):
        for j in range(6):
            others = [i for i in range(6) if i != j]
            lost_R = rows_RI[:, j] * w_OI[o, j]
            moved = torch.linalg.lstsq(rows_RI[:, others], lost_R[:, None]).solution
            least = (lost_R[:, None] - rows_RI[:, others] @ moved).square().sum()
            assert float(score_OI[o, j]) == pytest.approx(float(least), rel=2e-3, abs=1e-9)


def test_obs_of_independent_channels_is_wandas_square():
    """Without correlation nothing can make up for a weight: the loss is (w·‖x‖)²."""
    x_TI = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    w_OI = torch.tensor([[1.0, -2.0, 0.5]])
    expected_OI = Wanda().score(w_OI, gathered(x_TI)).square()
    torch.testing.assert_close(OBS(damping=1e-6).score(w_OI, gathered(x_TI)), expected_OI, rtol=1e-4, atol=0)


def test_weights_that_are_zero_have_no_importance(w_OI, x_TI):
    for importance in (Magnitude(), Wanda(), RIA(), OBS()):
        score_OI = importance.score(w_OI, gathered(x_TI))
        assert (score_OI >= 0).all()
        assert (score_OI == 0).nonzero().tolist() == [[1, 2]]


def test_a_hessian_that_cannot_be_inverted_is_refused(w_OI):
    statistics = gathered(torch.full((3, 6), math.nan))
    with pytest.raises(BesaError, match="not positive definite"):
        OBS().score(w_OI, statistics)


def test_only_obs_needs_the_gram_matrix():
    assert [importance.needs_gram for importance in (Magnitude, Wanda, RIA, OBS)] == [False, False, False, True]
