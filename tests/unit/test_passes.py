"""Counting forward passes, and spending them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from besa.errors import BesaError
from besa.methods.recipe import Recipe
from besa.models.finding import find_blocks
from besa.models.whole import head_share
from besa.planning import forward_passes, spending, within
from tests.integration.test_families import config_of, random_model

HALF_STEPS = 88 / 64 / 2  # passes over half of every sequence


@pytest.mark.parametrize(
    ("recipe", "settings", "passes"),
    [
        ("wanda", (), 0.5 / 16 + 2),
        ("besa", (), 0.5 + 2 + 3 * HALF_STEPS),
        ("besa", ("allocation.crop=1", "allocation.steps=64"), 1 + 2 + 3),
        ("besa", ("allocation.granularity=attn-mlp",), 0.5 + 2 + 0.5 + 2 * 3 * HALF_STEPS),
        ("besa", ("allocation.batch=2",), 0.5 + 2 + 2 * 3 * HALF_STEPS),
        ("besa", ("allocation.batch=4", "allocation.crop=0.5"), 0.5 + 2 + 4 * 3 * HALF_STEPS),
        ("besa", ("allocation.batch=4",), 1 + 2 + 4 * 3 * HALF_STEPS),  # half as many steps of whole sequences
        ("fast", (), 0.5 / 16 + 2 + 3 / 8),  # eight sequences of 64
        ("fast", ("allocation.sequences=32",), 0.5 / 16 + 2 + 3 / 8 + 3 / 2),  # measured twice
        ("besa", ("importance.statistics_every=8",), 0.5 + 1 / 8 + 1 + 3 * HALF_STEPS),
        (
            "besa",
            ("importance.statistics_every=8", "allocation.teacher=pruned"),
            0.5 / 16 + 1 + 1 / 8 + 1 + 3 * HALF_STEPS,
        ),
        ("besa", ("importance.statistics_every=8", "reconstruction.method=obs"), 0.5 + 2 + 3 * HALF_STEPS),
        ("wanda", ("importance.statistics_every=48",), 0.5 / 16 + 2 / 64 + 1),
        ("wanda", ("targets.method=search",), 0.5 / 16 + 2 + (3 + 1 + 4) / 8),
        ("wanda", ("targets={method: search, sequences: 16, strengths: [0, 1]}",), 0.5 / 16 + 2 + (3 + 1 + 2) / 4),
        ("wanda", ("allocation={method: nm, mixed: true}",), 0.5 / 16 + 2 + 3 / 8),
        ("wanda", ("allocation={method: nm}",), 0.5 / 16 + 2),
        (
            "best",
            ("finetune={method: adam, epochs: 4}", "distill.method=none"),
            1 + 2 + 3 / 8 + 4 * (3 * 7 + 1) / 8 + 1 / 8,
        ),
    ],
)
def test_passes_are_those_of_the_algorithm(recipe: str, settings: tuple[str, ...], passes: float) -> None:
    assert forward_passes(Recipe.load(recipe, 0.5, settings), 64, 512) == pytest.approx(passes)


def test_steps_that_would_repeat_few_sequences_take_them_whole() -> None:
    """44 steps of whole sequences are as many tokens as 88 of halves, but the dense path computes all tokens."""
    assert forward_passes(Recipe.load("besa"), 16, 512) == pytest.approx(1 + 2 + 3 * 44 / 16)
    assert forward_passes(Recipe.load("besa", None, ["allocation.crop=0.5"]), 16, 512) == pytest.approx(
        0.5 + 2 + 3 * 44 / 16
    )


@pytest.mark.parametrize(("learns", "stages"), [("weights", 1), ("norms", 1), ("both", 2), ("together", 1)])
def test_distilling_runs_blocks_twice_and_heads_of_both_models(learns: str, stages: int) -> None:
    """For each learned sequence: forward, again, backward (2); the head forward, backward, and of the dense model."""
    recipe = Recipe.load("wanda", None, [f"distill={{method: kl, learns: {learns}, epochs: 3}}"])
    for head in (0.0, 0.25):
        epoch = ((4 + 3 * head) * 7 + (1 + 2 * head)) / 8
        expected = 2 + 1 / 32 + 1 + 3 * stages * epoch + (1 + 2 * head) / 8  # all tokens through the dense model
        assert forward_passes(recipe, 64, 512, head=head) == pytest.approx(expected)


def test_further_sequences_go_through_the_dense_model_too() -> None:
    """Those of an epoch are as many as it learns from, seven eighths of the calibration set."""
    same, further = (
        Recipe.load("wanda", None, [f"distill={{method: kl, epochs: 3, further: {new}}}"]) for new in ("false", "true")
    )
    assert forward_passes(further, 64, 512) - forward_passes(same, 64, 512) == pytest.approx(2 * 7 / 8)
    epochs = [spending(recipe, forward_passes(further, 64, 512), 64, 512).distill.epochs for recipe in (same, further)]
    assert epochs == [3, 3]
    assert spending(further, forward_passes(further, 64, 512) - 0.01, 64, 512).distill.epochs == 2


def test_the_head_is_a_share_of_the_blocks(tiny_llama) -> None:
    blocks = find_blocks(tiny_llama)
    inside = sum(parameter.numel() for parameter in tiny_llama.model.layers.parameters())
    assert head_share(tiny_llama, blocks) == 1024 * 96 / inside


@pytest.mark.parametrize("family", ["mixtral", "phimoe"])
def test_of_experts_those_of_a_token_count(family) -> None:
    model = random_model(config_of(family))
    blocks = find_blocks(model)
    experts, chosen = model.config.num_local_experts, model.config.num_experts_per_tok
    assert 0 < chosen < experts
    idle = sum(one.numel for block in blocks for one in block.prunables.values() if one.routed) * (1 - chosen / experts)
    inside = sum(parameter.numel() for block in blocks for parameter in block.module.parameters())
    head = model.config.vocab_size * model.config.hidden_size
    assert head_share(model, blocks) == pytest.approx(head / (inside - idle))


def test_distilling_has_what_fine_tuning_leaves() -> None:
    recipe = Recipe.load("best", None, ["finetune={method: adam, epochs: 2}"])
    spent = spending(recipe, 40, 64, 512, head=0.25)
    assert spent.finetune.epochs == 2
    more = spent.model_copy(update={"distill": spent.distill.model_copy(update={"epochs": spent.distill.epochs + 1})})
    assert forward_passes(spent, 64, 512, head=0.25) <= 40 < forward_passes(more, 64, 512, head=0.25)
    with pytest.raises(BesaError, match=r"too few: best takes .* with one epoch of distilling"):
        spending(recipe, 10, 64, 512)


def test_experts_need_the_statistics_of_all_sequences() -> None:
    recipe = Recipe.load("besa", 0.5, ("importance.statistics_every=8",))
    assert forward_passes(recipe, 64, 512, routed=True) == pytest.approx(0.5 + 2 + 3 * HALF_STEPS)


@given(st.floats(10, 300), st.integers(2, 200), st.integers(2, 4096))
def test_as_many_epochs_as_fit_and_no_more(passes: float, samples: int, seqlen: int) -> None:
    best = Recipe.load("best")

    def taken(epochs: int) -> float:
        distill = best.distill.model_copy(update={"epochs": epochs})
        return forward_passes(best.model_copy(update={"distill": distill}), samples, seqlen)

    try:
        epochs = spending(best, passes, samples, seqlen).distill.epochs
    except BesaError:
        assert taken(1) > passes
    else:
        assert taken(epochs) <= passes + 1e-9 < taken(epochs + 1) + 2e-9


def test_passes_come_in_place_of_minutes_and_only_they() -> None:
    timed = within(Recipe.load("best"), 5)
    assert spending(timed, 60, 64, 512) == spending(Recipe.load("best"), 60, 64, 512)
    assert spending(timed, 60, 64, 512).distill.minutes is None


def test_minutes_are_for_recipes_that_distil() -> None:
    assert within(Recipe.load("best"), 2.5).distill.minutes == 2.5
    with pytest.raises(BesaError, match=r"^Recipe fast does not distil, .*choose the recipe best.*\.$"):
        within(Recipe.load("fast"), 2.5)
    for minutes in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(BesaError, match="give a positive number"):
            within(Recipe.load("best"), minutes)


def test_what_cannot_be_spent_is_refused() -> None:
    with pytest.raises(BesaError, match="does not fine-tune"):
        spending(Recipe.load("besa"), 60, 64, 512)
    with pytest.raises(BesaError, match="too few"):
        spending(Recipe.load("best"), 5, 64, 512)
    with pytest.raises(BesaError, match="nan passes are nothing to spend"):
        spending(Recipe.load("best"), float("nan"), 64, 512)
    for endless in (float("inf"), 1e300):
        with pytest.raises(BesaError, match="more than can be counted"):
            spending(Recipe.load("best"), endless, 64, 512)
