"""Which linears are to have how many zeros: exact totals, and patterns that mean what they match."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from besa.counting.budget import Budget, zeros_for
from besa.errors import BesaError
from besa.methods.recipe import Recipe
from besa.methods.targets.budgets import budgets
from besa.models.blocks import Block
from besa.models.prunable import Prunable

SHAPES = {"attn.q": (4, 6), "attn.k": (2, 6), "mlp.up": (5, 7)}  # 24 + 12 + 35 = 71 weights


def make_blocks(*shapes: dict[str, tuple[int, int]]) -> list[Block]:
    made = []
    for index, block in enumerate(shapes):
        prunables = {f"m.{index}.{name}": Prunable(f"{name}.weight", *shape) for name, shape in block.items()}
        made.append(Block(index, f"m.{index}", nn.Identity(), prunables))
    return made


@pytest.fixture
def blocks() -> list[Block]:
    return make_blocks(SHAPES, SHAPES)


def refusal(blocks: list[Block], **choices) -> str:
    with pytest.raises(BesaError) as caught:
        budgets(blocks, Recipe(**choices))
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def test_without_patterns_each_block_shares_one_budget(blocks):
    # 142 weights, half of them 71: the first block's share of 35.5 is rounded up.
    names = [tuple(block.prunables) for block in blocks]
    assert budgets(blocks, Recipe(sparsity=0.5)) == [[Budget(names[0], 71, 36)], [Budget(names[1], 71, 35)]]


def test_what_is_skipped_has_no_budget(blocks):
    plan = budgets(blocks, Recipe(sparsity=0.5, skip=("*.q", "m.1.mlp.*")))
    # 12 + 35 and 12 weights are left: 59, and half of that to even 30 (29.5).
    assert plan == [[Budget(("m.0.attn.k", "m.0.mlp.up"), 47, 24)], [Budget(("m.1.attn.k",), 12, 6)]]


def test_a_block_that_is_skipped_whole_has_no_budgets(blocks):
    plan = budgets(blocks, Recipe(sparsity=0.25, skip=("m.0.*",)))
    assert plan == [[], [Budget(tuple(blocks[1].prunables), 71, 18)]]


def test_what_has_a_sparsity_of_its_own_has_a_budget_of_its_own(blocks):
    plan = budgets(blocks, Recipe(sparsity=0.5, sparsity_of={"*.k": 0.25, "m.1.*.up": 1.0}))
    # Of 24 + 35 + 24 = 83 weights in common 42 (41.5 to even) go: 59 · 42 / 83 = 29.86.
    assert plan == [
        [Budget(("m.0.attn.q", "m.0.mlp.up"), 59, 30), Budget(("m.0.attn.k",), 12, 3)],
        [Budget(("m.1.attn.q",), 24, 12), Budget(("m.1.attn.k",), 12, 3), Budget(("m.1.mlp.up",), 35, 35)],
    ]


def test_everything_may_have_a_sparsity_of_its_own(blocks):
    plan = budgets(blocks, Recipe(sparsity=0.5, sparsity_of={"*": 0.0}))
    assert plan == [[Budget((name,), part.numel, 0) for name, part in block.prunables.items()] for block in blocks]


def test_a_linear_that_is_skipped_needs_no_sparsity(blocks):
    plan = budgets(blocks, Recipe(sparsity=0.5, skip=("*.q",), sparsity_of={"m.0.attn.*": 0.75}))
    assert plan[0] == [Budget(("m.0.mlp.up",), 35, plan[0][0].zeros), Budget(("m.0.attn.k",), 12, 9)]


@pytest.mark.parametrize("pattern", ["*.Q", "q", "attn.q", "m.2.*", "*.q.weight"])
def test_patterns_that_match_nothing_are_refused(blocks, pattern):
    """They match whole names, and case."""
    told = f"pattern {pattern} matches no prunable weight: `besa inspect` lists their names."
    assert refusal(blocks, skip=("*.k", pattern)) == f"The skip {told}"
    assert refusal(blocks, sparsity_of={"*.k": 0.5, pattern: 0.5}) == f"The sparsity_of {told}"


def test_two_sparsities_of_one_linear_are_refused(blocks):
    told = "Two patterns of sparsity_of match m.1.attn.k: make them disjoint."
    assert refusal(blocks, sparsity_of={"m.1.*": 0.3, "*.k": 0.4}) == told
    plan = budgets(blocks, Recipe(sparsity_of={"m.1.*": 0.3, "m.0.attn.k": 0.4}))
    assert [budget.zeros for budget in plan[1]] == [7, 4, 10]


def test_a_sparsity_of_what_is_skipped_is_refused(blocks):
    told = "The sparsity_of pattern *.k decides nothing: all that it matches is skipped."
    assert refusal(blocks, skip=("*.attn.*",), sparsity_of={"*.k": 0.4}) == told
    plan = budgets(blocks, Recipe(skip=("m.0.*",), sparsity_of={"*.k": 0.4}))
    assert plan[0] == [] and len(plan[1]) == 2


def test_skipping_everything_is_refused(blocks):
    assert refusal(blocks, skip=("*.attn.*", "*.up")) == "The skip patterns leave nothing to prune: drop one."


@st.composite
def cases(draw):
    """Up to four blocks, and any of their linears skipped or with a sparsity of its own."""
    sides = st.integers(1, 30)
    shapes = draw(
        st.lists(st.dictionaries(st.sampled_from("abcde"), st.tuples(sides, sides), min_size=1), min_size=1, max_size=4)
    )
    blocks = make_blocks(*shapes)
    names = [name for block in blocks for name in block.prunables]
    skip = draw(st.lists(st.sampled_from(names), unique=True, max_size=len(names) - 1))
    shares = st.floats(0, 1)
    own = draw(st.dictionaries(st.sampled_from([name for name in names if name not in skip]), shares))
    sparsity = draw(st.floats(0, 1, exclude_max=True))
    return blocks, Recipe(sparsity=sparsity, skip=tuple(skip), sparsity_of=own)


@given(cases())
@settings(deadline=None)
def test_totals_are_exact(case):
    blocks, recipe = case
    plan = budgets(blocks, recipe)
    sizes = {name: prunable.numel for block in blocks for name, prunable in block.prunables.items()}
    assert len(plan) == len(blocks)
    common_weights = common_zeros = 0
    for block, block_budgets in zip(blocks, plan, strict=True):
        named = [name for budget in block_budgets for name in budget.names]
        assert sorted(named) == sorted(set(block.prunables) - set(recipe.skip))
        for budget in block_budgets:
            assert budget.weights == sum(sizes[name] for name in budget.names)
            assert 0 <= budget.zeros <= budget.weights
            if budget.names[0] in recipe.sparsity_of:
                assert len(budget.names) == 1
                assert budget.zeros == zeros_for(recipe.sparsity_of[budget.names[0]], budget.weights)
            else:
                assert not set(budget.names) & set(recipe.sparsity_of)
                assert abs(budget.zeros - recipe.sparsity * budget.weights) <= 1.5  # roundings of total and of prefixes
                common_weights += budget.weights
                common_zeros += budget.zeros
    assert common_zeros == zeros_for(recipe.sparsity, common_weights)
