"""N:M patterns with every importance and reconstruction, and ADMM: exact, and better than what they start from."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import besa
from besa.allocation import NM, BlockProblem, RankedLinear
from besa.budget import Budget
from besa.errors import BesaError
from besa.masks import hard_mask, rank
from besa.recipe import Recipe
from besa.reconstruction import ADMM, ConjugateGradient, Frozen, OBSUpdate
from besa.statistics import InputStatistics

WIDTH = 16
METHODS = [Frozen(), ConjugateGradient(), ADMM(), OBSUpdate(), OBSUpdate(mask="fixed"), OBSUpdate(columns=5)]


def gathered(x_TI) -> InputStatistics:
    statistics = InputStatistics.empty(x_TI.shape[1], True, x_TI.device)
    statistics.add(x_TI)
    return statistics


@pytest.fixture
def w_OI():
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def x_TI():
    generator = torch.Generator().manual_seed(1)
    x_TI = torch.randn(120, WIDTH, generator=generator)
    return x_TI + x_TI @ torch.randn(WIDTH, WIDTH, generator=generator) / 3


def error(w_OI, rebuilt_OI, x_TI) -> float:
    return float((x_TI @ (w_OI - rebuilt_OI).T).square().sum())


@given(data=st.data())
@settings(deadline=None)
def test_ranks_of_groups_are_a_permutation_that_takes_every_group_alike(data):
    group, groups = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    importance_OI = torch.randint(0, 4, (3, group * groups), generator=generator).float()
    w_OI = torch.randint(0, 3, importance_OI.shape, generator=generator).float()
    ranks_OI = rank(importance_OI, w_OI, group)
    assert ranks_OI.dtype == torch.int16
    assert (ranks_OI.sort(dim=1).values == torch.arange(group * groups)).all()
    for taken in range(group + 1):
        kept_OGM = hard_mask(ranks_OI, torch.full((3,), taken * groups)).reshape(3, groups, group)
        for kept_M, i_M, w_M in zip(
            kept_OGM.reshape(-1, group), importance_OI.reshape(-1, group), w_OI.reshape(-1, group), strict=True
        ):
            order = sorted(range(group), key=lambda j: (w_M[j] != 0, w_M[j] != 0 and i_M[j], j))
            assert [j for j in range(group) if not kept_M[j]] == sorted(order[:taken])


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4), (3, 4)])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.method}")
def test_every_reconstruction_keeps_to_the_pattern(w_OI, x_TI, pattern, method):
    keep, of = pattern
    ranks_OI, counts_O = rank(w_OI.abs(), w_OI, of), torch.full((6,), WIDTH // of * (of - keep))
    rebuilt_OI = method.rebuild(w_OI, ranks_OI, counts_O, gathered(x_TI), of)
    assert ((rebuilt_OI != 0).reshape(6, -1, of).sum(dim=2) == keep).all()
    frozen_OI = Frozen().rebuild(w_OI, ranks_OI, counts_O, gathered(x_TI), of)
    if method != Frozen():
        assert error(w_OI, rebuilt_OI, x_TI) < error(w_OI, frozen_OI, x_TI)


def test_allocation_by_hand_and_its_refusal(w_OI):
    linear = RankedLinear(w_OI, w_OI.abs(), rank(w_OI.abs(), w_OI, 4))
    problem = BlockProblem(None, {"a": linear}, w_OI, w_OI, [Budget(("a",), 96, 24)], seed=0)
    assert NM(keep=3, of=4).allocate(problem).counts["a"].tolist() == [4] * 6
    w_OI[2, 4:6] = 0
    with pytest.raises(BesaError, match="a has groups of 4 with more than 1 zeros already"):
        NM(keep=3, of=4).allocate(problem)
    assert NM().allocate(problem).counts["a"].tolist() == [8] * 6


@pytest.mark.parametrize(
    ("settings_", "told"),
    [
        ({"sparsity": 0.6}, "2:4 pattern leaves no choice: set sparsity=0.5"),
        ({"sparsity_of": {"*.k_proj": 0.3}}, "2:4 pattern leaves no choice"),
        ({"allocation": NM(keep=4, of=4)}, "keeps fewer than it is of"),
        ({"targets": {"method": "owl"}}, "targets.method=uniform"),
        ({"quantization": {"method": "minmax", "clipping": "none"}}, "quantization.method=none"),
    ],
)
def test_what_a_pattern_does_not_go_with(settings_, told):
    with pytest.raises(ValueError, match=told):
        Recipe.model_validate({"allocation": NM(), **settings_})


@pytest.mark.parametrize("importance", ["magnitude", "wanda", "obs"])
def test_a_model_of_2_of_4(importance, tiny_llama, tiny_llama_folder, tiny_tokenizer):
    recipe = Recipe.load(
        "wanda", None, ["allocation={method: nm}", f"importance.method={importance}", "reconstruction.method=cg"]
    )
    text = str(tiny_llama_folder / "calibration.txt")
    result = besa.compress(tiny_llama, recipe, text, samples=2, seqlen=32, tokenizer=tiny_tokenizer)
    assert result.record.sparsity == 0.5
    for name, parameter in tiny_llama.named_parameters():
        if "_proj" in name:
            assert ((parameter != 0).reshape(len(parameter), -1, 4).sum(dim=2) == 2).all()


def test_columns_that_are_no_whole_number_of_groups_are_refused(tiny_llama, tiny_llama_folder, tiny_tokenizer):
    recipe = Recipe(allocation=NM(keep=35, of=70))
    with pytest.raises(BesaError, match="columns, which are no whole number of groups of 70"):
        besa.compress(
            tiny_llama,
            recipe,
            str(tiny_llama_folder / "calibration.txt"),
            samples=2,
            seqlen=32,
            tokenizer=tiny_tokenizer,
        )


# ADMM


def test_admm_finds_the_best_mask_where_channels_do_not_depend_on_each_other(w_OI):
    x_TI = torch.diag(torch.linspace(0.5, 2, WIDTH))
    score_OI = (w_OI * x_TI.diagonal()).abs()
    counts_O = torch.tensor([8, 8, 3, 0, 16, 12])
    rebuilt_OI = ADMM(damping=1e-6).rebuild(w_OI, rank(w_OI.abs(), w_OI), counts_O, gathered(x_TI))
    torch.testing.assert_close(rebuilt_OI, w_OI * hard_mask(rank(score_OI, w_OI), counts_O), rtol=1e-4, atol=1e-5)


def test_admm_comes_near_the_best_of_all_masks():
    """Rows of eight weights that lose four: all seventy masks are tried, each with its least squares."""
    generator = torch.Generator().manual_seed(5)
    w_OI, x_TI = torch.randn(20, 8, generator=generator), torch.randn(60, 8, generator=generator)
    x_TI = x_TI + x_TI @ torch.randn(8, 8, generator=generator) / 2
    statistics, counts_O = gathered(x_TI), torch.full((20,), 4)
    ranks_OI = rank(w_OI.abs() * statistics.squares_I.sqrt(), w_OI)
    masks = [[j not in gone for j in range(8)] for gone in itertools.combinations(range(8), 4)]
    best = 0.0
    for w_I in w_OI:
        parts = [(x_TI[:, torch.tensor(kept)], (x_TI @ w_I)[:, None]) for kept in masks]
        best += min(float((x @ torch.linalg.lstsq(x, y).solution - y).square().sum()) for x, y in parts)
    errors = {
        method.method: error(w_OI, method.rebuild(w_OI, ranks_OI, counts_O, statistics), x_TI)
        for method in (ConjugateGradient(damping=1e-5), ADMM(damping=1e-5))
    }
    assert best * 0.999 <= errors["admm"] < best + 0.6 * (errors["cg"] - best)


def test_admm_keeps_zeros_and_counts(w_OI, x_TI):
    w_OI[:, ::4] = 0
    counts_O = torch.tensor([4, 5, 8, 4, 16, 12])
    rebuilt_OI = ADMM().rebuild(w_OI, rank(w_OI.abs(), w_OI), counts_O, gathered(x_TI))
    assert (rebuilt_OI[:, ::4] == 0).all()
    assert torch.equal((rebuilt_OI == 0).sum(dim=1), counts_O)
