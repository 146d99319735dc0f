"""What experts add to their tokens, against the formula, a token and an expert at a time; and which of them go."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear, silu

from besa.errors import BesaError
from besa.methods.dropping import Frequency, Reap
from besa.methods.dropping.dropper import highest
from besa.models.ends import capture_inputs
from besa.models.finding import find_blocks
from besa.models.mixtures import Mixtures, find_mixtures
from besa.observing.contributions import Contributions, contributions
from tests.integration.test_families import TOKENS, config_of, random_model


def reference(mlp, x_TC, experts, gates_TE, gated_inputs=False):
    """Σ gate · ‖output‖ and the number of tokens of each expert; gates of experts that were not chosen are zero."""
    norms, tokens = [0.0] * experts, [0] * experts
    for t, gates in enumerate(gates_TE.tolist()):
        for expert, gate in enumerate(gates):
            if gate:
                x_C = x_TC[t] * gate if gated_inputs else x_TC[t]
                norms[expert] += float(mlp(expert, x_C).norm()) * (1 if gated_inputs else gate)
                tokens[expert] += 1
    return norms, tokens


def qwen3(block, x_TC):
    """Softmax over all, the two largest divided by their sum."""
    moe = block.module.mlp
    probabilities_TE = linear(x_TC, moe.gate.weight).softmax(dim=1)
    top = probabilities_TE.topk(2, dim=1)
    gates_TE = torch.zeros_like(probabilities_TE).scatter(1, top.indices, top.values)
    if moe.gate.norm_topk_prob:
        gates_TE = gates_TE / gates_TE.sum(dim=1, keepdim=True)

    def mlp(expert, x_C):
        gate_I, up_I = (moe.experts.gate_up_proj[expert] @ x_C).chunk(2)
        return moe.experts.down_proj[expert] @ (silu(gate_I) * up_I)

    return mlp, gates_TE, False


def llama4(block, x_TC):
    """The sigmoid of the largest logit, which the input is multiplied by."""
    moe = block.module.feed_forward
    logits_TE = linear(x_TC, moe.router.weight)
    top = logits_TE.topk(1, dim=1)
    gates_TE = torch.zeros_like(logits_TE).scatter(1, top.indices, top.values.sigmoid())

    def mlp(expert, x_C):
        gate_I, up_I = (x_C @ moe.experts.gate_up_proj[expert]).chunk(2)
        return (silu(gate_I) * up_I) @ moe.experts.down_proj[expert]

    return mlp, gates_TE, True


def jetmoe(block, x_TC):
    """Softmax over the two largest logits."""
    moe = block.module.mlp
    top = linear(x_TC, moe.router.layer.weight).topk(2, dim=1)
    gates_TE = torch.zeros(len(x_TC), 4).scatter(1, top.indices, top.values.softmax(dim=1))

    def mlp(expert, x_C):
        gate_I, up_I = (moe.input_linear.weight[expert] @ x_C).chunk(2)
        return moe.output_linear.weight[expert] @ (silu(gate_I) * up_I)

    return mlp, gates_TE, False


@pytest.mark.parametrize(
    ("family", "place", "formula"),
    [("qwen3_moe", "mlp", qwen3), ("llama4", "feed_forward", llama4), ("jetmoe", "mlp", jetmoe)],
)
def test_contributions_are_those_of_the_formula(family, place, formula):
    model = random_model(config_of(family))
    blocks = find_blocks(model)
    mixtures = [each for each in find_mixtures(model, blocks).each if each.block == 0]
    (inputs_NTC,) = capture_inputs(model, blocks, TOKENS.tokens_NT[:2], 2)
    seen = []
    hook = blocks[0].module.get_submodule(place).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad(), contributions(blocks[0], mixtures) as found:
        blocks[0](inputs_NTC)
    hook.remove()
    x_TC = seen[0].reshape(-1, 64)
    mlp, gates_TE, gated_inputs = formula(blocks[0], x_TC)
    norms, tokens = reference(mlp, x_TC, 4, gates_TE, gated_inputs)
    one = found[f"{blocks[0].name}.{place}"]
    assert one.tokens_E.tolist() == tokens
    assert one.norms_E.tolist() == pytest.approx(norms, rel=1e-4)
    assert len(found) == (2 if family == "jetmoe" else 1)
    # Nothing watches any more.
    with torch.no_grad():
        blocks[0](inputs_NTC)
    assert one.tokens_E.tolist() == tokens


def test_scores():
    found = Contributions(torch.tensor([6.0, 1.0, 0.0]), torch.tensor([3, 1, 0]))
    assert Reap().score(found).tolist() == [2.0, 1.0, 0.0]
    assert Frequency().score(found).tolist() == [3, 1, 0]


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_the_highest_of_each_group_stay(data):
    """Ties, which small whole numbers make many of, fall to the earlier expert."""
    groups, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    of_group = data.draw(st.integers(1, size))
    scores = data.draw(st.lists(st.integers(0, 2), min_size=groups * size, max_size=groups * size))
    stay = highest(torch.tensor(scores), groups * of_group, groups)
    expected = []
    for group in range(groups):
        own = range(group * size, (group + 1) * size)
        expected += sorted(sorted(own, key=lambda expert: (scores[expert], expert))[size - of_group :])
    assert stay == expected


@pytest.mark.parametrize(("share", "experts", "gone"), [(0.5, 3, 1), (0.5, 5, 2), (0.25, 6, 1), (0.25, 10, 2)])
def test_of_two_numbers_as_near_to_a_share_the_smaller_goes(share, experts, gone):
    assert experts - Reap(share=share).kept(Mixtures((), experts, 1, 1)) == gone


@given(share=st.floats(0.01, 0.99), experts=st.integers(2, 64), groups=st.integers(1, 4), least=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_a_share_is_the_nearest_whole_number_or_refused(share, experts, groups, least):
    mixtures = Mixtures((), groups * experts, groups, min(groups * least, groups * experts))
    possible = [groups * gone for gone in range(experts + 1)]
    try:
        gone = mixtures.experts - Reap(share=share).kept(mixtures)
    except BesaError:
        nearest = min(possible, key=lambda number: abs(number - share * mixtures.experts))
        assert nearest == 0 or mixtures.experts - nearest < mixtures.least
        return
    assert gone in possible and mixtures.experts - gone >= mixtures.least
    assert abs(gone - share * mixtures.experts) <= groups / 2 + 1e-9
