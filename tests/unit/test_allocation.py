"""Zeros per row: exact always, the paper's equations where they are learned, and better than uniform for it."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from besa.counting.budget import Budget, split
from besa.counting.masks import rank
from besa.errors import BesaError
from besa.methods import apportioning
from besa.methods.allocation import Allocated, Besa, BlockProblem, RankedLinear, Uniform, descent
from besa.methods.allocation.changing import ChangingLinears
from besa.methods.importance import Wanda
from besa.methods.reconstruction import NoReconstruction
from besa.models.blocks import Block
from besa.models.ends import capture_inputs
from besa.models.finding import find_blocks
from besa.models.prunable import find_prunables
from besa.observing.input_statistics import collect
from besa.observing.losses import error_between, reconstruction_error
from besa.system import machine
from besa.system.ranks import Share

TARGETS = [0.05, 0.3, 0.7, 0.95]


# The loss


def test_reconstruction_error_is_relative_and_per_channel():
    target_NTC = torch.tensor([[[1.0, 100.0], [2.0, 0.0]], [[-2.0, 0.0], [0.0, 0.0]]])
    y_NTC = torch.tensor([[[2.0, 90.0], [2.0, 0.0]], [[-2.0, 0.0], [-1.0, 20.0]]])
    # Channel 0: (1 + 1) / (1 + 4 + 4); channel 1: (100 + 400) / 10000.
    expected = (2 / 9 + 0.05) / 2
    assert float(reconstruction_error(y_NTC, target_NTC)) == pytest.approx(expected, rel=1e-6)
    assert float(reconstruction_error(y_NTC.bfloat16(), target_NTC.bfloat16())) == pytest.approx(expected, rel=1e-6)
    assert float(reconstruction_error(target_NTC, target_NTC)) == 0
    plain = float((y_NTC - target_NTC).square().sum() / target_NTC.square().sum())
    for share in (0.25, 1.0):
        mixed = (1 - share) * expected + share * plain
        assert float(reconstruction_error(y_NTC, target_NTC, share)) == pytest.approx(mixed, rel=1e-5)


def test_a_channel_that_should_be_silent_does_not_break_the_loss():
    silent_NTC = torch.zeros(1, 1, 2)
    assert float(reconstruction_error(silent_NTC, silent_NTC)) == 0
    assert reconstruction_error(silent_NTC + 1e-3, silent_NTC).isfinite()


@pytest.mark.parametrize("tokens", [2, 5])
@pytest.mark.parametrize("share", [1, 2, 3, 7, 20])
def test_error_between_is_the_reconstruction_error_of_every_so_manyth_sequence(share, tokens):
    generator = torch.Generator().manual_seed(share)
    y_NTC, target_NTC = torch.randn(2, 7, 5, 3, generator=generator) * torch.tensor([0.1, 1.0, 50.0])
    expected = float(reconstruction_error(y_NTC[::share, :tokens], target_NTC[::share, :tokens]))
    assert expected > 0.1
    cpu, whole = torch.device("cpu"), Share.whole(7)
    assert float(error_between(y_NTC, target_NTC, whole, share, tokens, cpu)) == pytest.approx(expected, rel=1e-5)
    fewer_NTC = target_NTC[::share, :tokens]
    assert float(error_between(y_NTC, fewer_NTC, whole, share, tokens, cpu)) == pytest.approx(expected, rel=1e-5)
    assert error_between(y_NTC, y_NTC, whole, share, tokens, cpu) == 0


# Problems


@pytest.fixture(scope="module")
def pristine_problem(pristine_tiny_llama, tiny_llama_folder, tiny_tokenizer):
    """A block of the tiny Llama on 24 sequences of its calibration text, half of its weights to go."""
    text = (tiny_llama_folder / "calibration.txt").read_text(encoding="utf-8")[:20_000]
    tokens_L = torch.tensor(tiny_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    model = copy.deepcopy(pristine_tiny_llama)
    blocks = find_blocks(model)
    x_NTC = torch.cat(list(capture_inputs(model, blocks, tokens_L[: 24 * 40].reshape(24, 40), 24, {10, 20})))
    targets_NTC = torch.empty_like(x_NTC)
    with collect(blocks[0].module, blocks[0].prunables, gram=False) as statistics:
        blocks[0].run(x_NTC, 4, into=targets_NTC)
    linears = {}
    for name in blocks[0].prunables:
        w_OI = blocks[0].weight(name).clone()
        importance_OI = Wanda().score(w_OI, statistics[name])
        linears[name] = RankedLinear(w_OI, importance_OI, rank(importance_OI, w_OI))
    return at(BlockProblem(blocks[0], linears, x_NTC, targets_NTC, [], 0, Share.whole(len(x_NTC))), 0.5)


@pytest.fixture
def problem(pristine_problem):
    """A copy of that, to change at will."""
    return copy.deepcopy(pristine_problem)


def weights_of(linears: dict[str, RankedLinear]) -> int:
    return sum(linear.w_OI.numel() for linear in linears.values())


def one_budget(linears: dict[str, RankedLinear], zeros: int) -> list[Budget]:
    return [Budget(tuple(linears), weights_of(linears), zeros)]


def at(problem: BlockProblem, sparsity: float) -> BlockProblem:
    """The problem with one budget for all of its linears."""
    return dataclasses.replace(
        problem, budgets=one_budget(problem.linears, round(sparsity * weights_of(problem.linears)))
    )


def with_exceptions(problem: BlockProblem) -> BlockProblem:
    """Half of the block to go, but of k_proj a fifth, of v_proj nothing, and of up_proj 0.8; o_proj is left out."""
    own = {"k_proj": 0.2, "v_proj": 0.0, "up_proj": 0.8}
    linears = {name: linear for name, linear in problem.linears.items() if not name.endswith("o_proj")}
    rest = {name: linear for name, linear in linears.items() if not name.endswith(tuple(own))}
    budgets = one_budget(rest, weights_of(rest) // 2)
    for name, linear in linears.items():
        for end, sparsity in own.items():
            if name.endswith(end):
                budgets += one_budget({name: linear}, round(sparsity * linear.w_OI.numel()))
    return dataclasses.replace(problem, linears=linears, budgets=budgets)


def small_problem(weights, zeros, importances=None) -> BlockProblem:
    """Weights ranked by `importances`, or by magnitude, in a block that no uniform allocation runs."""
    importances = importances or {name: w_OI.abs() for name, w_OI in weights.items()}
    linears = {
        name: RankedLinear(w_OI, importances[name], rank(importances[name], w_OI)) for name, w_OI in weights.items()
    }
    nothing = torch.zeros(1, 1, 1)
    budgets = one_budget(linears, zeros)
    return BlockProblem(Block(0, "b", nn.Identity(), {}), linears, nothing, nothing, budgets, 0, Share.whole(0))


def error(problem: BlockProblem, counts: dict[str, torch.Tensor]) -> float:
    """Loss of the block when each row loses its lowest ranks, on all sequences at once."""
    weights = {
        name: NoReconstruction().rebuild(linear.w_OI, linear.ranks_OI, counts[name], statistics=None)
        for name, linear in problem.linears.items()
    }
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    assert zeros == sum(budget.zeros for budget in problem.budgets)
    with torch.no_grad():
        y_NTC = torch.cat([problem.block(x_NTC, weights) for x_NTC in problem.inputs_NTC.split(4)])
        return float(reconstruction_error(y_NTC, problem.targets_NTC))


def assert_exact(problem: BlockProblem, counts: dict[str, torch.Tensor]) -> None:
    assert set(counts) == set(problem.linears)
    for name, linear in problem.linears.items():
        rows, width = linear.w_OI.shape
        assert counts[name].shape == (rows,)
        assert counts[name].dtype == torch.int64
        assert (counts[name] >= linear.zeros_O).all()
        assert (counts[name] <= width).all()
    for budget in problem.budgets:
        assert sum(int(counts[name].sum()) for name in budget.names) == budget.zeros


def test_the_loss_of_single_linears_heeds_the_share_of_the_plain_error(problem):
    own = dataclasses.replace(problem, own_outputs=True)
    weights = {name: torch.where(linear.ranks_OI < 30, 0, linear.w_OI) for name, linear in problem.linears.items()}
    relative, half, plain = (float(own.error(0, 40, weights, share)) for share in (0.0, 0.5, 1.0))
    assert half == pytest.approx((relative + plain) / 2)
    assert abs(relative - plain) > 0.01 * plain


# Uniform


@st.composite
def small_problems(draw):
    """One to three linears without zeros, their importance in whole numbers (ties), and any number of zeros to go."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shapes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7)), min_size=1, max_size=3))
    weights = {f"b.{i}": torch.rand(shape, generator=generator) + 1 for i, shape in enumerate(shapes)}
    importances = {name: torch.randint(0, 9, w_OI.shape, generator=generator).float() for name, w_OI in weights.items()}
    return small_problem(weights, draw(st.integers(0, sum(map(torch.numel, weights.values())))), importances)


@given(small_problems())
@settings(deadline=None)
def test_uniform_per_row_spreads_zeros_evenly(problem):
    counts = Uniform(per="row").allocate(problem).counts
    assert_exact(problem, counts)
    for name, counts_O in counts.items():
        linear = problem.linears[name]
        share = problem.budgets[0].sparsity * linear.w_OI.numel()
        assert abs(int(counts_O.sum()) - share) <= 1  # its share of the block, to the rounding of two prefixes
        assert counts_O.tolist() == sorted(counts_O.tolist(), reverse=True)  # what is left over goes to the first rows
        assert int(counts_O.max() - counts_O.min()) <= 1


@given(small_problems())
@settings(deadline=None)
def test_uniform_per_linear_has_one_threshold(problem):
    counts = Uniform(per="linear").allocate(problem).counts
    assert_exact(problem, counts)
    for name, counts_O in counts.items():
        rows, width = problem.linears[name].w_OI.shape
        importance_OI = problem.linears[name].importance_OI.tolist()
        places = sorted((importance_OI[o][i], o, i) for o in range(rows) for i in range(width))
        pruned = places[: int(counts_O.sum())]
        assert counts_O.tolist() == [sum(o == row for _, o, _ in pruned) for row in range(rows)]
        assert {place: problem.linears[name].ranks_OI[place[1:]] < counts_O[place[1]] for place in places} == {
            place: place in pruned for place in places
        }


def test_uniform_with_an_odd_total():
    problem = small_problem({"a": torch.ones(3, 5), "b": torch.ones(2, 5)}, zeros=13)
    # 13 · 15 / 25 = 7.8 and 13 · 10 / 25 = 5.2.
    counts = Uniform().allocate(problem).counts
    assert {name: counts_O.tolist() for name, counts_O in counts.items()} == {"a": [3, 3, 2], "b": [3, 2]}


@pytest.mark.parametrize("per", ["row", "linear"])
def test_uniform_counts_weights_that_are_zero_already(per):
    w_OI = torch.tensor([[0.0, 0.0, 0.0, 9.0], [1.0, 2.0, 3.0, 4.0]])
    counts = Uniform(per=per).allocate(small_problem({"a": w_OI}, zeros=4)).counts
    assert counts["a"].tolist() == [3, 1]
    counts = Uniform(per=per).allocate(small_problem({"a": w_OI}, zeros=5)).counts
    assert counts["a"].tolist() == [3, 2]


@pytest.mark.parametrize("per", ["row", "linear"])
def test_uniform_refuses_more_zeros_than_asked_for(per):
    w_OI = torch.tensor([[0.0, 0.0, 0.0, 9.0], [1.0, 2.0, 3.0, 4.0]])
    with pytest.raises(BesaError, match="3 zeros already"):
        Uniform(per=per).allocate(small_problem({"a": w_OI}, zeros=2))


@pytest.mark.parametrize("sparsity", [0.0, *TARGETS, 1.0])
@pytest.mark.parametrize("per", ["row", "linear"])
def test_uniform_on_a_block(problem, per, sparsity):
    problem = at(problem, sparsity)
    allocated = Uniform(per=per).allocate(problem)
    assert allocated.losses == []
    assert_exact(problem, allocated.counts)
    for name, counts_O in allocated.counts.items():
        share = problem.budgets[0].sparsity * problem.linears[name].w_OI.numel()
        assert abs(int(counts_O.sum()) - share) <= 1


@pytest.mark.parametrize("per", ["row", "linear"])
def test_uniform_meets_every_budget_by_itself(problem, per):
    problem = with_exceptions(problem)
    counts = Uniform(per=per).allocate(problem).counts
    assert_exact(problem, counts)
    for budget in problem.budgets:
        for name in budget.names:
            assert abs(int(counts[name].sum()) - budget.sparsity * problem.linears[name].w_OI.numel()) <= 1


def test_uniform_without_a_budget_does_nothing(problem):
    assert Uniform().allocate(dataclasses.replace(problem, linears={}, budgets=[])).counts == {}


# Learning


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rates", ["row", "layer"])
def test_besa_meets_any_target_exactly(problem, rates, target):
    problem = at(problem, target)
    allocated = Besa(rates=rates, tolerance=0).allocate(problem)
    assert_exact(problem, allocated.counts)
    assert len(allocated.losses) == 64
    if rates == "layer":
        assert all(int(counts_O.max() - counts_O.min()) <= 1 for counts_O in allocated.counts.values())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rates", ["row", "layer"])
def test_learning_alone_can_reach_any_target(problem, monkeypatch, rates, target):
    """Under a strong penalty the learned rates meet the budget before they are made to: no alpha is out of reach."""
    problem = at(problem, target)
    wanted = []
    apportion = apportioning.apportion
    monkeypatch.setattr(apportioning, "apportion", lambda *given: (wanted.append(given[:2]), apportion(*given))[1])
    Besa(rates=rates, penalty=1000).allocate(problem)
    ((rates_R, widths_R),) = wanted
    assert float((rates_R * widths_R).sum() / widths_R.sum()) == pytest.approx(target, abs=0.01)


@pytest.mark.parametrize("mask", ["count", "probability"])
@pytest.mark.parametrize("rates", ["row", "layer"])
def test_besa_beats_uniform_at_the_same_budget(problem, rates, mask):
    uniform = error(problem, Uniform().allocate(problem).counts)
    allocated = Besa(rates=rates, mask=mask, steps=48, crop=1).allocate(problem)
    assert error(problem, allocated.counts) < 0.95 * uniform
    first, last = allocated.losses[:8], allocated.losses[-8:]
    assert sum(last) < sum(first)


def test_rows_of_their_own_are_worth_having(problem):
    """Row-wise rates differ between rows, and do better than one rate for each linear."""
    row = Besa(rates="row", steps=48, crop=1).allocate(problem).counts
    layer = Besa(rates="layer", steps=48, crop=1).allocate(problem).counts
    assert all(int(counts_O.max() - counts_O.min()) > 1 for counts_O in row.values())
    assert error(problem, row) < error(problem, layer)


def test_besa_is_deterministic_and_draws_by_its_seed(problem):
    first, second = Besa().allocate(problem), Besa().allocate(problem)
    assert first.losses == second.losses
    assert all(torch.equal(first.counts[name], second.counts[name]) for name in first.counts)
    other = Besa().allocate(dataclasses.replace(problem, seed=1))
    assert other.losses != first.losses
    assert_exact(problem, other.counts)


def test_learning_changes_neither_the_block_nor_its_weights(problem):
    before = {name: problem.block.weight(name).clone() for name in problem.block.prunables}
    Besa().allocate(problem)
    for name, w_OI in before.items():
        assert torch.equal(problem.block.weight(name), w_OI)
        assert torch.equal(problem.linears[name].w_OI, w_OI)
    assert all(parameter.grad is None for parameter in problem.block.module.parameters())


def first(problem, samples):
    """The problem with its first sequences only."""
    states = {name: getattr(problem, name)[:samples] for name in ("inputs_NTC", "targets_NTC")}
    return dataclasses.replace(problem, share=Share.whole(samples), **states)


def test_every_step_has_its_loss(problem):
    few = first(problem, 10)
    once, thrice = (Besa(steps=steps, tolerance=0).allocate(few).losses for steps in (9, 30))
    assert (len(once), len(thrice)) == (9, 30)
    assert once[0] == thrice[0]


def test_steps_are_of_fresh_gradients_and_shrink_to_nothing(problem, monkeypatch):
    rates, gradients = [], []

    class Watched(torch.optim.Adam):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            gradients.append(torch.cat([logits_RD.grad.flatten() for logits_RD in self.param_groups[0]["params"]]))
            return super().step()

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    one = first(problem, 1)
    Besa(steps=2, travel=1e-9).allocate(one)
    assert rates == pytest.approx([1e-9, 0.5e-9])  # linearly to zero
    torch.testing.assert_close(gradients[1], gradients[0])  # the same step again, as nothing moved


def test_the_first_loss_is_that_of_the_uniform_mask(problem):
    """Learning starts with ⌊target · I⌋ weights of every row pruned."""
    one = first(problem, 1)
    counts = {
        name: torch.full((linear.w_OI.shape[0],), linear.w_OI.shape[1] // 2) for name, linear in problem.linears.items()
    }
    assert Besa(steps=1, crop=1, autocast=False).allocate(one).losses == [pytest.approx(error(one, counts), rel=1e-4)]


def test_tolerance_stops_early(problem):
    # Rates that hardly move lower no loss by 1 %: the second pass is the last.
    still = Besa(steps=120, travel=1e-6).allocate(problem)
    assert len(still.losses) == 48
    assert_exact(problem, still.counts)
    assert len(Besa(steps=72, tolerance=0).allocate(problem).losses) == 72
    assert len(Besa(steps=72, tolerance=0.9).allocate(problem).losses) == 48


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([4.0, 4.0, 3.9, 3.9], True),
        ([4.0, 4.0, 3.0, 3.0], False),
        ([3.0, 5.0, 3.9, 3.9], True),  # means of passes, not single steps
        ([4.0, 4.0, 5.0, 3.0], True),
        ([4.0, 4.0], False),
        ([4.0, 4.0, 4.0], False),  # in the middle of a pass
        ([9.0, 9.0, 4.0, 4.0, 3.9, 3.9], True),
        ([4.0, 4.0, 5.0, 5.0], True),
    ],
)
def test_convergence_compares_two_passes(losses, stops):
    steps = [torch.tensor(loss) for loss in losses for _ in range(8)]  # passes of 16 sequences
    assert Besa(tolerance=0.1)._converged(steps, in_pass=16) == stops
    assert not Besa(tolerance=0)._converged(steps, in_pass=16)


def test_the_losses_of_short_passes_are_looked_at_after_at_least_16_steps():
    same = [torch.tensor(4.0)] * 48  # three passes of 6 sequences between two looks
    assert [n for n in range(1, 49) if Besa(tolerance=0.1)._converged(same[:n], in_pass=6)] == [18, 36]


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_nothing_is_learned_where_nothing_can_be_chosen(problem, sparsity):
    problem = at(problem, sparsity)
    allocated = Besa().allocate(problem)
    assert allocated.losses == []
    assert_exact(problem, allocated.counts)


def test_besa_counts_weights_that_are_zero_already(problem):
    linears = {}
    for name, linear in problem.linears.items():
        w_OI = linear.w_OI.clone()
        if name.endswith("q_proj"):
            w_OI[:40, :80] = 0  # more than any row would lose
        linears[name] = RankedLinear(w_OI, linear.importance_OI, rank(linear.importance_OI, w_OI))
    thinned = dataclasses.replace(problem, linears=linears)
    allocated = Besa().allocate(thinned)
    assert_exact(thinned, allocated.counts)
    assert error(thinned, allocated.counts) > 0
    with pytest.raises(BesaError, match="3,200 zeros already"):
        Besa().allocate(dataclasses.replace(thinned, budgets=one_budget(linears, 3199)))


# Several budgets, and what calibration did not reach


@pytest.mark.parametrize("mask", ["count", "probability"])
@pytest.mark.parametrize("rates", ["row", "layer"])
def test_besa_meets_every_budget_by_itself(problem, rates, mask):
    problem = with_exceptions(problem)
    allocated = Besa(rates=rates, mask=mask).allocate(problem)
    assert_exact(problem, allocated.counts)
    assert len(allocated.losses) == 64
    shared = problem.budgets[0]
    shares = [int(allocated.counts[name].sum()) for name in shared.names]
    assert shares != split(shared.zeros, [problem.linears[name].w_OI.numel() for name in shared.names])  # learned


def test_a_linear_without_a_budget_stays_dense_while_others_learn(problem):
    """Learning starts with ⌊target · I⌋ weights of every row pruned, and the block's own weight of o_proj."""
    one = first(problem, 1)
    one = with_exceptions(one)
    masked = {}
    for budget in one.budgets:
        for name in budget.names:
            linear = one.linears[name]
            counts_O = torch.full(linear.w_OI.shape[:1], int(budget.sparsity * linear.w_OI.shape[1]))
            masked[name] = NoReconstruction().rebuild(linear.w_OI, linear.ranks_OI, counts_O, statistics=None)
    (left_out,) = set(one.block.prunables) - set(masked)

    def expected() -> float:
        return float(reconstruction_error(one.block(one.inputs_NTC, masked), one.targets_NTC))

    dense = expected()
    assert Besa(steps=1, crop=1, autocast=False).allocate(one).losses == [pytest.approx(dense, rel=1e-4)]
    one.block.weight(left_out).zero_()
    assert expected() != pytest.approx(dense, rel=1e-2)
    assert Besa(steps=1, crop=1, autocast=False).allocate(one).losses == [pytest.approx(expected(), rel=1e-4)]


def test_learning_looks_at_the_distance_of_each_budget(problem, monkeypatch):
    """Under a strong penalty the rates of each budget meet it before they are made to."""
    problem = with_exceptions(problem)
    wanted = []
    apportion = apportioning.apportion
    monkeypatch.setattr(apportioning, "apportion", lambda *given: (wanted.append(given[:2]), apportion(*given))[1])
    Besa(penalty=200).allocate(problem)
    for budget, (rates_R, widths_R) in zip(problem.budgets, wanted, strict=True):
        assert float((rates_R * widths_R).sum() / widths_R.sum()) == pytest.approx(budget.sparsity, abs=0.01)


def test_nothing_is_learned_of_linears_that_no_token_reached(problem):
    linears = {
        name: dataclasses.replace(linear, reached=not name.endswith(("q_proj", "up_proj")))
        for name, linear in problem.linears.items()
    }
    problem = at(dataclasses.replace(problem, linears=linears), 0.3)
    counts = Besa().allocate(problem).counts
    assert_exact(problem, counts)
    for name, linear in linears.items():
        spread = int(counts[name].max() - counts[name].min())
        assert (spread > 1) == linear.reached
    (unreached,) = {name for name in linears if name.endswith("up_proj")}
    missed = counts[unreached].double().mean() / 96 - 0.3  # the shift that makes the budget exact is common to all
    assert abs(float(missed)) < 0.02


def test_nothing_is_learned_where_no_token_reached_anything(problem):
    linears = {name: dataclasses.replace(linear, reached=False) for name, linear in problem.linears.items()}
    unreached = dataclasses.replace(problem, linears=linears)
    allocated = Besa().allocate(unreached)
    assert allocated.losses == []
    assert_exact(unreached, allocated.counts)
    uniform = Uniform().allocate(problem).counts
    for name, counts_O in allocated.counts.items():
        assert (counts_O - uniform[name]).abs().max() <= 1


def test_besa_without_a_budget_does_nothing(problem):
    nothing = dataclasses.replace(problem, linears={}, budgets=[])
    assert Besa().allocate(nothing) == Allocated({}, [])


# The budget while learning


def zeros_at_every_step(problem: BlockProblem, recipe: Besa, monkeypatch) -> torch.Tensor:
    """How far the zeros of the masks are from each budget, in rows of it, (steps, budgets)."""
    found = []
    update = ChangingLinears.update

    def watched(self):
        update(self)
        (budget,) = (budget for budget in problem.budgets if set(budget.names) >= set(self.weights))
        zeros = sum(int((w_OI == 0).sum()) for w_OI in self.weights.values())
        found.append((zeros - budget.zeros) / sum(w_OI.shape[0] for w_OI in self.weights.values()))

    monkeypatch.setattr(ChangingLinears, "update", watched)
    steps = len(recipe.allocate(problem).losses)
    return torch.tensor(found).reshape(steps, -1)


@pytest.mark.parametrize(
    ("rates", "target", "penalty"),
    [
        ("row", 0.05, 100),
        ("layer", 0.5, 100),
        ("row", 0.95, 100),
        ("layer", 0.95, 0),
    ],
)
def test_count_masks_meet_the_budget_at_every_step(problem, monkeypatch, rates, target, penalty):
    missed = zeros_at_every_step(at(problem, target), Besa(rates=rates, penalty=penalty), monkeypatch)
    assert missed.shape == (64, 1)
    assert missed.abs().max() <= 1


def test_count_masks_meet_every_budget_at_every_step(problem, monkeypatch):
    missed = zeros_at_every_step(with_exceptions(problem), Besa(), monkeypatch)
    assert missed.shape == (64, 3)  # v_proj has nothing to learn
    assert missed.abs().max() <= 1


def test_probability_masks_need_not_meet_it(problem, monkeypatch):
    missed = zeros_at_every_step(problem, Besa(mask="probability", penalty=0), monkeypatch)
    assert missed.abs().max() > 1


# Precision


def test_learning_in_bfloat16_is_nearly_learning_in_float32(problem, monkeypatch):
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda device: True)
    rounded = Besa().allocate(problem)
    full = Besa(autocast=False).allocate(problem)
    assert rounded.losses != full.losses
    assert rounded.losses == pytest.approx(full.losses, rel=0.05)
    assert error(problem, rounded.counts) == pytest.approx(error(problem, full.counts), rel=0.02)
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda device: False)
    assert Besa().allocate(problem).losses == full.losses


def in_dtype(problem: BlockProblem, dtype: torch.dtype) -> BlockProblem:
    """The problem of the same block in another dtype; the block itself changes."""
    problem.block.module.to(dtype)
    for arguments in problem.block.arguments.values():
        arguments["position_embeddings"] = tuple(part.to(dtype) for part in arguments["position_embeddings"])
    return dataclasses.replace(
        problem,
        linears={n: dataclasses.replace(linear, w_OI=linear.w_OI.to(dtype)) for n, linear in problem.linears.items()},
        inputs_NTC=problem.inputs_NTC.to(dtype),
        targets_NTC=problem.targets_NTC.to(dtype),
    )


@pytest.mark.parametrize("scaled", [True, False])
def test_a_float16_model_learns_although_its_gradients_underflow(problem, monkeypatch, scaled):
    inputs_NTC = 4000 * problem.inputs_NTC  # the loss is relative, so its gradients become as much smaller
    targets_NTC = torch.empty_like(inputs_NTC)
    problem.block.run(inputs_NTC, 4, into=targets_NTC)
    large = dataclasses.replace(
        problem, inputs_NTC=inputs_NTC, targets_NTC=targets_NTC, share=Share.whole(len(inputs_NTC))
    )
    recipe = Besa(tolerance=0, autocast=False, steps=12)
    single = torch.cat(list(recipe.allocate(large).counts.values())).float()
    if not scaled:
        monkeypatch.setattr(descent, "loss_scaler", lambda *_: torch.amp.GradScaler("cpu", enabled=False))
    half = torch.cat(list(recipe.allocate(in_dtype(large, torch.float16)).counts.values())).float()
    widths = torch.cat([torch.full((len(one.w_OI),), one.w_OI.shape[1]) for one in problem.linears.values()])
    likeness = torch.corrcoef(torch.stack([single, half]) / widths)[0, 1]
    assert likeness > 0.98 if scaled else likeness < 0.8


def test_a_bfloat16_model_learns_as_it_is(problem, monkeypatch):
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda device: pytest.fail("asked"))
    halved = in_dtype(problem, torch.bfloat16)
    assert Besa().allocate(halved).losses == pytest.approx(Besa(autocast=False).allocate(halved).losses)


def test_a_step_of_all_sequences_is_along_their_mean_gradient(problem, monkeypatch):
    """A sequence that is there twice counts as one: the mean of equal gradients is the gradient."""
    seen = []

    class Watched(torch.optim.Adam):
        def step(self):
            seen.append(torch.cat([logits_RD.grad.flatten() for logits_RD in self.param_groups[0]["params"]]))
            return super().step()

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    one = first(problem, 1)
    states = {name: getattr(one, name).repeat(4, 1, 1) for name in ("inputs_NTC", "targets_NTC")}
    four = dataclasses.replace(one, share=Share.whole(4), **states)
    losses = [Besa(steps=1).allocate(one).losses, Besa(steps=1, batch=4).allocate(four).losses]
    assert torch.equal(seen[0], seen[1])
    assert losses[0] == losses[1]


def test_convergence_is_looked_for_after_passes_of_batches(problem):
    """Eight sequences, four a step: a pass has two steps, and a look comes after eight passes."""
    eight = first(problem, 8)
    assert len(Besa(steps=30, batch=4, tolerance=0.99).allocate(eight).losses) == 16


class Choice(nn.Module):
    """Two experts in a list, of which the sign of the input chooses one."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 4, bias=False) for _ in range(2))

    def forward(self, x):
        return self.experts[int(x.mean() > 0)](x)


@pytest.mark.parametrize("batch", [1, 2])
def test_an_expert_that_a_sequence_does_not_reach_has_no_gradient_from_the_one_before(monkeypatch, batch):
    """A step's gradient of an expert is that of the sequences that reach it, over all sequences of the step."""
    torch.manual_seed(0)
    module = Choice().requires_grad_(False)
    prunables = find_prunables(module)
    block = Block(0, "b", module, prunables, {(1, 3): {}, (2, 3): {}})
    inputs_NTC = torch.stack([torch.rand(3, 6), -torch.rand(3, 6)])
    targets_NTC = torch.cat([module(x_NTC[None]) for x_NTC in inputs_NTC])
    linears = {}
    for name in prunables:
        w_OI = block.weight(name).clone()
        linears[name] = RankedLinear(w_OI, w_OI.abs(), rank(w_OI.abs(), w_OI))
    budget = Budget(tuple(linears), 48, 24)
    problem = BlockProblem(block, linears, inputs_NTC, targets_NTC, [budget], 0, Share.whole(2))
    seen = []
    backward = ChangingLinears.backward

    def watched(self, factor, penalty):
        seen.append([gradient.clone() for gradient in self.gradients])
        backward(self, factor, penalty)

    monkeypatch.setattr(ChangingLinears, "backward", watched)
    Besa(steps=2, batch=batch, tolerance=0, crop=1, autocast=False, travel=1e-9).allocate(problem)
    steps = seen.copy()
    seen.clear()
    for place in range(2):
        states = {name: getattr(problem, name)[place : place + 1] for name in ("inputs_NTC", "targets_NTC")}
        one = dataclasses.replace(problem, share=Share.whole(1), **states)
        Besa(steps=1, crop=1, autocast=False, travel=1e-9).allocate(one)
    for expert in range(2):
        found = sum(gradients[expert] for gradients in steps) / len(steps)
        alone = sum(gradients[expert] for gradients in seen) / 2
        assert alone.any()
        torch.testing.assert_close(found, alone)
