"""Structured pruning: scores and choices against brute force, whole units only, as near to the sparsity as can be."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from besa.data.calibration import Calibration
from besa.errors import BesaError
from besa.methods.allocation import RankedLinear, Structured
from besa.methods.allocation.structured import lowest_structures
from besa.methods.fisher import loss_gradients
from besa.methods.importance import Magnitude
from besa.methods.recipe import Recipe
from besa.methods.reconstruction import ADMM, ConjugateGradient, OBSUpdate
from besa.methods.survey import Survey
from besa.methods.targets.budgets import budgets
from besa.models.activations import Room
from besa.models.couplings import Coupling, couplings
from besa.models.finding import find_blocks
from besa.models.streaming import DecoderInMemory
from besa.pruning import prune_blocks
from tests.prunable_weights import prunable_weights

TOKENS = Calibration(torch.randint(0, 1024, (4, 16), generator=torch.Generator().manual_seed(0)), "random", 0)


def prune(model, sparsity, reconstruction=None, **settings_):
    recipe = Recipe(
        sparsity=sparsity,
        importance=Magnitude(),
        allocation=Structured(**settings_),
        **({"reconstruction": reconstruction} if reconstruction else {}),
    )
    return prune_blocks(DecoderInMemory(model), recipe, TOKENS).records


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_the_lowest_structures_are_those_of_a_sort(data):
    """Ties, which small whole numbers make many of, fall to the earlier unit."""
    units, size, power = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2]))
    number = data.draw(st.integers(0, units))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    importance_OI = torch.randint(0, 3, (2, units * size), generator=generator).float()
    linear = RankedLinear(importance_OI, importance_OI, importance_OI, power=power)
    coupling = Coupling("ffn", units, {}, {"down": size}, 2 * size)
    errors = [
        sum(float(row[u * size + k]) ** power for row in importance_OI for k in range(size)) for u in range(units)
    ]
    expected = sorted(range(units), key=lambda u: (errors[u], u))[:number]
    assert lowest_structures(coupling, {"down": linear}, number).nonzero().flatten().tolist() == sorted(expected)


@given(sparsity=st.floats(0, 0.58) | st.just(0.0), multiple=st.integers(1, 100))  # 50 channels stay, at least
@settings(max_examples=50, deadline=None)
def test_the_budget_is_the_nearest_that_whole_structures_allow(pristine_tiny_llama, sparsity, multiple):
    blocks = find_blocks(pristine_tiny_llama)[:2]
    recipe = Recipe(sparsity=sparsity, allocation=Structured(multiple=multiple))
    plan = budgets(blocks, recipe)
    weights, channel = prunable_weights(blocks[0]), 3 * 96
    possible = [(256 - kept) * channel for kept in {256, *range(multiple, 257, multiple)}]
    for block, (budget,) in zip(blocks, plan, strict=True):
        assert budget.zeros == plan[0][0].zeros
        assert (256 - budget.zeros // channel) % multiple == 0 or budget.zeros == 0
        nearest = min(abs(zeros - sparsity * weights) for zeros in possible)
        assert abs(budget.zeros - sparsity * weights) <= nearest + 1e-6
        again = recipe.allocation.budget(block, budget.names, budget.sparsity)
        assert again == budget


def test_channels_and_heads_go_whole_and_the_rest_stays(tiny_llama, pristine_tiny_llama):
    records = prune(tiny_llama, 0.3, heads=0.5, multiple=16)
    for before, after, record in zip(pristine_tiny_llama.model.layers, tiny_llama.model.layers, records, strict=True):
        down_CI, o_CI = before.mlp.down_proj.weight, before.self_attn.o_proj.weight
        head = int(o_CI.square().reshape(96, 2, 48).sum(dim=(0, 2)).argmin())
        taken = 96 * (48 + 24 + 24 + 48)
        wanted = (0.3 * record.weights - taken) / (3 * 96)
        gone = 256 - 16 * round((256 - wanted) / 16)
        channels = down_CI.square().sum(dim=0).argsort(stable=True)[:gone]
        for name, rows in [("gate_proj", channels), ("up_proj", channels)]:
            expected_OI = getattr(before.mlp, name).weight.clone()
            expected_OI[rows] = 0
            assert torch.equal(getattr(after.mlp, name).weight, expected_OI)
        expected_OI = down_CI.clone()
        expected_OI[:, channels] = 0
        assert torch.equal(after.mlp.down_proj.weight, expected_OI)
        for name, size in [("q_proj", 48), ("k_proj", 24), ("v_proj", 24)]:
            expected_OI = getattr(before.self_attn, name).weight.clone()
            expected_OI[head * size : (head + 1) * size] = 0
            assert torch.equal(getattr(after.self_attn, name).weight, expected_OI)
        expected_OI = o_CI.clone()
        expected_OI[:, head * 48 : (head + 1) * 48] = 0
        assert torch.equal(after.self_attn.o_proj.weight, expected_OI)
        assert record.zeros == taken + gone * 3 * 96


def test_least_squares_move_what_stays_and_zeros_that_were_there_stay(tiny_llama):
    down_CI = tiny_llama.model.layers[0].mlp.down_proj.weight
    down_CI[:, 7] = 0  # goes before all others
    down_CI[5, ::2] = 0
    before_CI = down_CI.clone()
    prune(tiny_llama, 0.2, ConjugateGradient())
    gone_I = (down_CI == 0).all(dim=0)
    assert bool(gone_I[7])
    assert torch.equal(down_CI == 0, (before_CI == 0) | gone_I)
    assert not torch.equal(down_CI[:, ~gone_I], before_CI[:, ~gone_I])


def test_with_attention_skipped_the_sparsity_is_of_the_channels(pristine_tiny_llama):
    recipe = Recipe(sparsity=0.25, skip=("*attn*",), allocation=Structured())
    for (budget,) in budgets(find_blocks(pristine_tiny_llama), recipe):
        assert (budget.weights, budget.zeros) == (3 * 96 * 256, 3 * 96 * 64)


@given(
    targets=st.lists(st.floats(-0.1, 0.9), min_size=4, max_size=4),
    multiple=st.sampled_from([1, 8, 24, 100]),
    heads=st.sampled_from([0.0, 0.5]),
)
@settings(max_examples=50, deadline=None)
def test_the_whole_model_meets_the_sparsity_as_near_to_the_targets_as_can_be(
    pristine_tiny_llama, targets, multiple, heads
):
    """To half a step, also where the first step is smaller; and no other choice with as many steps is nearer."""
    blocks = find_blocks(pristine_tiny_llama)[:4]
    taken = 96 * (48 + 24 + 24 + 48) if heads else 0
    weights, size = prunable_weights(blocks[0]), 3 * 96 * multiple
    steps = -(-256 // multiple) - 1
    sparsity = min(max(sum(targets) / 4, taken / weights + 1e-6), (taken + steps * size) / weights)
    recipe = Recipe(sparsity=sparsity, allocation=Structured(multiple=multiple, heads=heads))
    plan = [budget for (budget,) in budgets(blocks, recipe, targets)]
    kept = [256 - (budget.zeros - taken) // (3 * 96) for budget in plan]
    gone = [0 if number == 256 else steps + 1 - number // multiple for number in kept]
    assert all(number % multiple == 0 or number == 256 for number in kept) and min(kept) >= min(multiple, 256)
    for block, budget, number in zip(blocks, plan, kept, strict=True):  # what is planned is what is pruned
        assert recipe.allocation.kept(block, budget)["ffn"] == (256, number)
    short = multiple * (steps + 1) - 256
    wanted = [(target * weights - taken) / (3 * 96) for target in targets]  # channels
    ideal = [(channels + short * (channels > 0)) / multiple for channels in wanted]
    nearest = min(max(sum(wanted), 0), 4 * (multiple * steps - short) if steps else 0)
    assert abs(sum(256 - number for number in kept) - nearest) <= multiple / 2 + 1e-6
    for more, less in itertools.permutations(range(4), 2):  # convex: moving one step is all there is to try
        if gone[more] < steps and gone[less]:
            change = (gone[more] + 1 - ideal[more]) ** 2 + (gone[less] - 1 - ideal[less]) ** 2
            assert change >= (gone[more] - ideal[more]) ** 2 + (gone[less] - ideal[less]) ** 2 - 1e-9


def test_sensitivities_of_whole_channels_are_those_of_a_sort(tiny_llama, tiny_llama_folder, tiny_tokenizer):
    """The sum of W²·Σx²·E[g²] over what reads a channel; the lowest of the whole model go first."""
    text = (tiny_llama_folder / "calibration.txt").read_text(encoding="utf-8")[:20_000]
    tokens_L = torch.tensor(tiny_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    calibration = Calibration(tokens_L[:96].reshape(4, 24), "text", 0)
    decoder, allocation = DecoderInMemory(tiny_llama), Structured()
    names = [tuple(block.prunables) for block in decoder.blocks]
    structures = [allocation.structures(block, own) for block, own in zip(decoder.blocks, names, strict=True)]
    cpu = torch.device("cpu")
    survey = Survey(decoder, calibration, names, 0.2, 2, cpu, Room(cpu, None), 7, structures)
    found = loss_gradients(survey, 2)
    scores, owners = [], []
    for block in decoder.blocks:
        name = f"{block.name}.mlp.down_proj"
        w_OI, squares_I, rows_O = block.weight(name), found.statistics[name].squares_I, found.squares[name]
        for channel in range(256):
            scores.append(float((w_OI[:, channel] ** 2 * rows_O).sum() * squares_I[channel]))
            owners.append(block.index)
    order = sorted(range(len(scores)), key=lambda place: scores[place])
    lowest = [owners[place] for place in order[: round(0.2 * sum(survey.sizes) / (3 * 96))]]
    for block, size, rate in zip(decoder.blocks, survey.sizes, found.rates, strict=True):
        assert rate == pytest.approx(lowest.count(block.index) * 3 * 96 / size, abs=0.01)  # scores are binned
    assert max(found.rates) - min(found.rates) > 0.05


def test_no_linear_has_a_sparsity_of_its_own(pristine_tiny_llama):
    recipe = Recipe(sparsity=0.3, allocation=Structured()).with_exceptions([], ["*.k_proj=0.3"])
    with pytest.raises(BesaError, match="leave out sparsity_of"):
        budgets(find_blocks(pristine_tiny_llama), recipe)


def test_couplings_of_the_tiny_llama(pristine_tiny_llama):
    heads, ffn = couplings(find_blocks(pristine_tiny_llama)[2])
    at = "model.layers.2"
    assert heads.rows == {f"{at}.self_attn.q_proj": 48, f"{at}.self_attn.k_proj": 24, f"{at}.self_attn.v_proj": 24}
    assert heads.columns == {f"{at}.self_attn.o_proj": 48}
    assert (heads.structures, heads.weights) == (2, 96 * (48 + 24 + 24 + 48))
    assert ffn.rows == {f"{at}.mlp.gate_proj": 1, f"{at}.mlp.up_proj": 1}
    assert ffn.columns == {f"{at}.mlp.down_proj": 1}
    assert (ffn.structures, ffn.weights) == (256, 3 * 96)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reconstruction": OBSUpdate(mask="adaptive")}, "reconstruction.mask=fixed"),
        ({"reconstruction": ADMM()}, "set reconstruction.method to none or cg"),
        ({"quantization": {"method": "minmax", "clipping": "first"}}, "quantization.method=none"),
    ],
)
def test_what_does_not_go_with_it(changes, words):
    Recipe(allocation=Structured(), reconstruction=OBSUpdate())
    with pytest.raises(ValueError, match=words):
        Recipe.model_validate({"allocation": Structured(), **changes})


@pytest.mark.parametrize(
    ("sparsity", "settings_", "skip", "words"),
    [
        (0.9, {}, (), "no feed-forward channels left"),
        (0.1, {"heads": 0.5}, (), "more than the sparsity asks for"),
        (0.5, {"heads": 0.9}, (), "no heads left"),
        (0.5, {}, ("*.up_proj",), "has no feed-forward that can be pruned whole"),
        (0.5, {"heads": 0.5}, ("*.k_proj",), "has no heads that can be pruned whole"),
        (0.3, {}, ("*.3.self_attn.*",), "skip the same linears"),
    ],
)
def test_budgets_that_cannot_be(pristine_tiny_llama, sparsity, settings_, skip, words):
    recipe = Recipe(sparsity=sparsity, skip=skip, allocation=Structured(**settings_))
    with pytest.raises(BesaError, match=words) as refusal:
        budgets(find_blocks(pristine_tiny_llama), recipe)
    assert str(refusal.value).endswith(".")
