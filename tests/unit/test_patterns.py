"""N:M patterns with every importance and reconstruction, and ADMM: exact, and better than what they start from."""

import dataclasses
import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import besa
from besa.counting.budget import Budget, zeros_for
from besa.counting.masks import hard_mask, rank
from besa.errors import BesaError
from besa.methods.allocation import NM, BlockProblem, RankedLinear
from besa.methods.recipe import Recipe
from besa.methods.reconstruction import ADMM, ConjugateGradient, NoReconstruction, OBSUpdate
from besa.models.blocks import Block
from besa.models.prunable import find_prunables
from besa.observing.input_statistics import InputStatistics
from besa.system.ranks import Share
from tests.slowly import some_slow

WIDTH = 16
METHODS = [NoReconstruction(), ConjugateGradient(), ADMM(), OBSUpdate(), OBSUpdate(mask="fixed"), OBSUpdate(columns=5)]


def gathered(x_TI) -> InputStatistics:
    statistics = InputStatistics.empty(x_TI.shape[1], True, x_TI.device)
    statistics.add(x_TI)
    statistics.add(x_TI, [True])
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
    frozen_OI = NoReconstruction().rebuild(w_OI, ranks_OI, counts_O, gathered(x_TI), of)
    if method != NoReconstruction():
        assert error(w_OI, rebuilt_OI, x_TI) < error(w_OI, frozen_OI, x_TI)


def test_allocation_by_hand(w_OI):
    linear = RankedLinear(w_OI, w_OI.abs(), rank(w_OI.abs(), w_OI, 4))
    problem = BlockProblem(None, {"a": linear}, w_OI, w_OI, [Budget(("a",), 96, 24)], 0, Share.whole(0))
    assert NM(keep=3, of=4).allocate(problem).counts["a"].tolist() == [4] * 6
    assert NM().allocate(problem).counts["a"].tolist() == [8] * 6


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.method}")
def test_groups_with_more_zeros_than_the_pattern_makes_fit_it(w_OI, x_TI, method):
    w_OI[2, 4:7] = 0
    linear = RankedLinear(w_OI, w_OI.abs(), rank(w_OI.abs(), w_OI, 4))
    problem = BlockProblem(None, {"a": linear}, w_OI, w_OI, [Budget(("a",), 96, 48)], 0, Share.whole(0))
    counts_O = NM().allocate(problem).counts["a"]
    assert counts_O.tolist() == [8] * 6
    kept_OG = (method.rebuild(w_OI, linear.ranks_OI, counts_O, gathered(x_TI), 4) != 0).reshape(6, -1, 4).sum(dim=2)
    assert (kept_OG <= 2).all()
    assert int(kept_OG.sum()) == 48 - (method == NoReconstruction())
    assert kept_OG[2, 1] >= 1


@pytest.mark.parametrize(
    ("settings_", "told"),
    [
        (
            {"sparsity": 0.6},
            "these settings: set sparsity=0.5 and no sparsity_of",
        ),
        (
            {"sparsity_of": {"*.k_proj": 0.3}},
            "these settings: set sparsity=0.5 and no sparsity_of",
        ),
        ({"allocation": {"method": "nm", "keep": 4, "of": 4}}, "must prune something"),
        ({"targets": {"method": "owl"}}, "targets.method=uniform"),
        ({"quantization": {"method": "minmax", "clipping": "none"}}, "quantization.method=none"),
    ],
)
def test_what_a_pattern_does_not_go_with(settings_, told):
    with pytest.raises(ValueError, match=told):
        Recipe.model_validate({"allocation": NM(), **settings_})


@pytest.mark.parametrize(("keep", "of", "sparsity"), [(4, 5, 0.2), (7, 10, 0.3), (9, 10, 0.1), (2, 4, 0.5)])
def test_a_sparsity_is_that_of_its_pattern_whatever_floats_make_of_it(keep, of, sparsity):
    assert Recipe(sparsity=sparsity, allocation=NM(keep=keep, of=of)).sparsity == sparsity


@pytest.mark.parametrize(("keep", "of"), [(1, 3), (3, 7), (5, 6)])
def test_the_sparsity_that_a_refusal_names_is_accepted(keep, of):
    with pytest.raises(ValueError, match="set sparsity=") as refused:
        Recipe(sparsity=0.5, allocation=NM(keep=keep, of=of))
    named = float(re.search(r"set sparsity=(\S+) ", str(refused.value))[1])
    assert Recipe(sparsity=named, allocation=NM(keep=keep, of=of)).sparsity == named


def test_exceptions_that_a_pattern_cannot_make_are_refused():
    recipe = Recipe(name="mine", allocation=NM())
    assert recipe.with_exceptions(["*.o_proj"], ["*.k_proj=0.5"]).sparsity_of == {"*.k_proj": 0.5}
    with pytest.raises(BesaError, match=r"^Recipe mine: allocation\.method=nm prunes exactly 0\.5 of"):
        recipe.with_exceptions([], ["*.k_proj=0.3"])


@pytest.mark.parametrize("importance", some_slow(["magnitude", "wanda", "obs"], {"magnitude"}))
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
    with pytest.raises(BesaError, match=r"^model\.layers\.0\.self_attn\.q_proj has .*, which are no whole .* of 70"):
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
    until_they_agree = ADMM(rounds=30, penalty=0.1, growth=1.33, hold=3)
    rebuilt_OI = until_they_agree.rebuild(w_OI, rank(w_OI.abs(), w_OI), counts_O, gathered(x_TI))
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
        for method in (ConjugateGradient(), ADMM())
    }
    assert best * 0.999 <= errors["admm"] < best + 0.6 * (errors["cg"] - best)


@pytest.mark.parametrize("settings", [{}, {"rounds": 5, "hold": 1, "growth": 1.5}, {"growth": 1.0}], ids=str)
def test_admm_takes_the_steps_of_its_definition(w_OI, x_TI, settings):
    """With the multiplier written out, and the weights without a mask solved for, in float64."""
    method, hessian_II = ADMM(**settings), gathered(x_TI).hessian(0.1)
    counts_O, first_OI = torch.tensor([8, 8, 3, 0, 16, 12]), hard_mask(rank(w_OI.abs(), w_OI), torch.full((6,), 8))
    masked_OI, kept_OI = method._in_turn(w_OI, first_OI, counts_O, hessian_II, None)

    scale_I = hessian_II.double().diagonal().sqrt()
    scaled_II, dense_OI = hessian_II.double() / torch.outer(scale_I, scale_I), w_OI.double() * scale_I
    z_OI, multiplier_OI = dense_OI * first_OI, torch.zeros_like(dense_OI)
    for done in range(method.rounds):
        penalty = method.penalty * method.growth ** (done // method.hold)
        left_II = scaled_II + penalty * torch.eye(WIDTH)
        free_OI = torch.linalg.solve(left_II, (dense_OI @ scaled_II + penalty * z_OI - multiplier_OI).T).T
        pulled_OI = free_OI + multiplier_OI / penalty
        z_OI = pulled_OI * hard_mask(rank(pulled_OI.abs(), w_OI), counts_O)
        multiplier_OI += penalty * (free_OI - z_OI)
    assert torch.equal(kept_OI, z_OI != 0)
    torch.testing.assert_close(masked_OI, (z_OI / scale_I).float(), rtol=1e-3, atol=1e-4)


def test_admm_keeps_zeros_and_counts(w_OI, x_TI):
    w_OI[:, ::4] = 0
    counts_O = torch.tensor([4, 5, 8, 4, 16, 12])
    rebuilt_OI = ADMM().rebuild(w_OI, rank(w_OI.abs(), w_OI), counts_O, gathered(x_TI))
    assert (rebuilt_OI[:, ::4] == 0).all()
    assert torch.equal((rebuilt_OI == 0).sum(dim=1), counts_O)


# An n for each linear


class Two(nn.Module):
    """A linear and another one of its output, beside a third."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)
        self.out, self.gate = nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).tanh()) + self.out(x).tanh() * self.gate(x).sum(-1, keepdim=True)


def two_problem(seed: int, pattern: NM, names=("up", "down", "out", "gate")) -> BlockProblem:
    torch.manual_seed(seed)
    module = Two().requires_grad_(False)
    for parameter in module.parameters():
        parameter *= torch.rand(()) * 3
    block = Block(0, "b", module, find_prunables(module), {(1, 5): {}})
    linears = {}
    for name in names:
        w_OI = block.weight(name)
        score_OI = w_OI.abs() * torch.rand(w_OI.shape[1])
        linears[name] = RankedLinear(w_OI, score_OI, rank(score_OI, w_OI, pattern.of))
    weights = sum(linear.w_OI.numel() for linear in linears.values())
    budget = Budget(tuple(names), weights, zeros_for(pattern.only_sparsity, weights))
    inputs_NTC = torch.randn(5, 5, 8)
    gradients, share = {name: torch.rand(len(linear.w_OI)) for name, linear in linears.items()}, Share.whole(5)
    return BlockProblem(block, linears, inputs_NTC, inputs_NTC, [budget], seed, share, gradients=gradients)


def error_of(problem: BlockProblem, pattern: NM, gone: tuple[int, ...]) -> float:
    """What Σ importance² · sensitivity over the lowest `gone` of each group of each linear comes to."""
    total = 0.0
    for (name, linear), number in zip(problem.linears.items(), gone, strict=True):
        error_OI = linear.importance_OI.square() * problem.gradients[name][:, None]
        groups_OGM = linear.importance_OI.reshape(len(error_OI), -1, pattern.of)
        lowest_OGM = groups_OGM.argsort(dim=2)[..., :number]
        total += float(error_OI.reshape(groups_OGM.shape).gather(2, lowest_OGM).double().sum())
    return total


@given(seed=st.integers(0, 10**6), pattern=st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2)]))
@settings(max_examples=25, deadline=None)
def test_mixed_patterns_are_the_best_of_all_that_meet_the_budget(seed, pattern):
    method = NM(keep=pattern[0], of=pattern[1], mixed=True)
    problem = two_problem(seed, method)
    counts = method.allocate(problem).counts
    gone = []
    for name, linear in problem.linears.items():
        (number,) = set((counts[name] // (linear.w_OI.shape[1] // method.of)).tolist())
        kept_OGM = hard_mask(linear.ranks_OI, counts[name]).reshape(len(linear.w_OI), -1, method.of)
        assert (kept_OGM.sum(dim=2) == method.of - number).all()
        gone.append(number)
    sizes = [linear.w_OI.numel() // method.of for linear in problem.linears.values()]
    zeros = problem.budgets[0].zeros
    assert sum(int(own_O.sum()) for own_O in counts.values()) == zeros
    every = [
        error_of(problem, method, numbers)
        for numbers in itertools.product(range(method.of), repeat=len(sizes))
        if sum(number * size for number, size in zip(numbers, sizes, strict=True)) == zeros
    ]
    assert error_of(problem, method, tuple(gone)) == pytest.approx(min(every), rel=1e-6)


def test_mixed_patterns_leave_alone_what_no_token_reached():
    method = NM(mixed=True)
    problem = two_problem(1, method)
    plain = method.allocate(problem).counts
    assert len({int(own_O[0]) / problem.linears[name].w_OI.shape[1] for name, own_O in plain.items()}) > 1
    moved = next(name for name, own_O in plain.items() if own_O[0] * 2 != problem.linears[name].w_OI.shape[1])
    linears = problem.linears | {moved: dataclasses.replace(problem.linears[moved], reached=False)}
    unmeasured = problem.gradients | {moved: torch.zeros_like(problem.gradients[moved])}  # where gradients were sent
    for changed in (dataclasses.replace(problem, linears=linears), dataclasses.replace(problem, gradients=unmeasured)):
        counts = method.allocate(changed).counts
        assert (counts[moved] * 2 == problem.linears[moved].w_OI.shape[1]).all()


@pytest.mark.parametrize("method", some_slow(["none", "cg", "admm", "obs"], {"admm", "cg"}))
def test_a_model_of_mixed_patterns(method, tiny_llama, tiny_llama_folder, tiny_tokenizer):
    recipe = Recipe.load("wanda", None, ["allocation={method: nm, mixed: true}", f"reconstruction.method={method}"])
    text = str(tiny_llama_folder / "calibration.txt")
    result = besa.compress(tiny_llama, recipe, text, samples=2, seqlen=32, tokenizer=tiny_tokenizer)
    assert [block.zeros * 2 for block in result.record.blocks] == [block.weights for block in result.record.blocks]
    numbers = set()
    for name, parameter in tiny_llama.named_parameters():
        if "_proj" in name:
            (number,) = set((parameter != 0).reshape(-1, 4).sum(dim=1).tolist())
            numbers.add(number)
    assert len(numbers) > 1
