"""Which block loses how much: exact and within bounds, and measured as a whole model's backward pass would."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM

import besa
from besa.data.calibration import Calibration
from besa.errors import BesaError
from besa.methods import fisher
from besa.methods.fisher import loss_gradients
from besa.methods.recipe import Recipe
from besa.methods.survey import Survey
from besa.methods.targets import LossSensitivity, Owl, Search, search
from besa.methods.targets.budgets import budgets
from besa.methods.targets.search import divergences
from besa.models.activations import Room
from besa.models.finding import find_blocks
from besa.models.source import locate
from besa.models.streaming import DecoderInMemory, DecoderOnDisk
from tests.prunable_weights import prunable_weights
from tests.slowly import some_slow

CPU = torch.device("cpu")


def blocks_and_tokens(model, folder, tokenizer, samples=4, seqlen=24):
    text = (folder / "calibration.txt").read_text(encoding="utf-8")[:20_000]
    tokens_L = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return find_blocks(model), Calibration(tokens_L[: samples * seqlen].reshape(samples, seqlen), "text", 0)


def survey(decoder, calibration, sparsity=0.5, names=None, activation_budget=1 << 40):
    names = names or [tuple(block.prunables) for block in decoder.blocks]
    return Survey(
        decoder, calibration, names, sparsity, 2, CPU, Room(CPU, activation_budget), 7, [[]] * len(decoder.blocks)
    )


@given(
    wanted=st.lists(st.floats(-3, 3), min_size=1, max_size=6),
    sparsity=st.floats(0.01, 0.99),
    least=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    data=st.data(),
)
@settings(deadline=None)
def test_bounds_hold_and_the_mean_is_the_sparsity(wanted, sparsity, least, data):
    sizes = data.draw(st.lists(st.integers(1, 1000), min_size=len(wanted), max_size=len(wanted)))
    found = Owl(least_pruned=least[0], least_kept=least[1]).bounded(wanted, sizes, sparsity)
    assert sum(rate * size for rate, size in zip(found, sizes, strict=True)) / sum(sizes) == pytest.approx(
        sparsity, abs=1e-6
    )
    assert all(least[0] * sparsity - 1e-9 <= rate <= 1 - least[1] * (1 - sparsity) + 1e-9 for rate in found)
    order = sorted(range(len(wanted)), key=lambda place: wanted[place])
    assert [found[place] for place in order] == sorted(found)


def test_within_the_bounds_targets_are_what_is_wanted_shifted():
    found = Owl().bounded([0.4, 0.5, 0.7], [10, 10, 20], 0.5)
    assert found == pytest.approx([0.325, 0.425, 0.625])


@pytest.mark.parametrize("targets", [[0.3, 0.4, 0.6, 0.7], [0.5] * 4, [0.3123, 0.4567, 0.71, 0.52]])
def test_budgets_meet_the_targets_and_the_models_zeros(tiny_llama, targets):
    blocks = find_blocks(tiny_llama)[:4]
    weights = sum(map(prunable_weights, blocks))
    mean = sum(targets) / len(targets)
    plan = budgets(blocks, Recipe(sparsity=mean), targets)
    assert sum(own.zeros for (own,) in plan) == round(mean * weights)
    for (own,), target in zip(plan, targets, strict=True):
        assert own.zeros == pytest.approx(target * own.weights, abs=1.5)


def test_targets_give_no_block_fewer_zeros_than_it_has(tiny_llama):
    blocks = find_blocks(tiny_llama)[:4]
    weights = prunable_weights(blocks[0])
    first = list(blocks[0].prunables)
    present = dict.fromkeys(first, 0) | {first[0]: 5000, first[1]: 600}
    plan = budgets(blocks, Recipe(sparsity=0.25), [0.01, 0.3, 0.33, 0.36], present)
    zeros = [own.zeros for (own,) in plan]
    assert zeros[0] == 5600 > 0.01 * weights
    assert sum(zeros) == weights  # a quarter of four
    assert [(target * weights - own) for target, own in zip([0.3, 0.33, 0.36], zeros[1:], strict=True)] == (
        pytest.approx([(5600 - 0.01 * weights) / 3] * 3, abs=1)
    )
    with pytest.raises(BesaError, match="zeros already"):
        budgets(blocks, Recipe(sparsity=0.25), [0.25] * 4, dict.fromkeys(first, weights // 6))


def test_exceptions_stand_beside_targets(tiny_llama):
    blocks = find_blocks(tiny_llama)[:4]
    recipe = Recipe(skip=("*.0.*",), sparsity_of={"*.1.*k_proj": 0.2})
    plan = budgets(blocks, recipe, [0.9, 0.4, 0.5, 0.58])
    assert plan[0] == []
    assert [own.sparsity for own in plan[1]] == pytest.approx([0.4, 0.2], abs=1e-2)
    shared = [plan[1][0], plan[2][0], plan[3][0]]
    assert sum(own.zeros for own in shared) == round(0.5 * sum(own.weights for own in shared))


def slow_scores(model, blocks, tokens_NT):
    """W²·Σx²·mean g² of every linear, from one backward pass through the whole model for the same labels."""
    squares, gradients, count = {}, {}, 0
    modules = {name: model.get_submodule(name) for block in blocks for name in block.prunables}
    generator = torch.Generator().manual_seed(7)
    for tokens_T in tokens_NT:
        outputs = {}

        def keep(module, inputs, output, outputs=outputs):
            output.retain_grad()
            outputs[module] = (inputs[0].detach(), output)

        handles = [module.register_forward_hook(keep) for module in modules.values()]
        embedded = model.get_input_embeddings()(tokens_T[None]).requires_grad_()
        logits_TV = model(inputs_embeds=embedded, use_cache=False).logits[0]
        below_TV = logits_TV.detach().softmax(-1).cumsum(-1) < torch.rand(len(logits_TV), 1, generator=generator)
        functional.cross_entropy(logits_TV, below_TV.sum(dim=-1), reduction="sum").backward()
        for handle in handles:
            handle.remove()
        count += len(tokens_T)
        for name, module in modules.items():
            x, y = outputs[module]
            squares[name] = squares.get(name, 0) + x[0].square().sum(dim=0)
            gradients[name] = gradients.get(name, 0) + y.grad[0].square().sum(dim=0)
    rows = {name: gradients[name] / count for name in modules}
    scores = {name: module.weight.square() * squares[name] * rows[name][:, None] for name, module in modules.items()}
    return scores, rows


@pytest.mark.parametrize(("sparsity", "tokens"), [(0.3, 10**6), (0.7, 5)])
def test_sensitivities_are_those_of_a_backward_pass_through_the_whole(
    sparsity, tokens, tiny_llama, tiny_llama_folder, tiny_tokenizer, monkeypatch
):
    """Whether the logits of a sequence are there all at once, or a few tokens at a time."""
    monkeypatch.setattr(fisher, "LOGITS", 4 * tiny_llama.config.vocab_size * tokens)
    blocks, calibration = blocks_and_tokens(tiny_llama, tiny_llama_folder, tiny_tokenizer)
    expected, expected_rows = slow_scores(tiny_llama, blocks, calibration.tokens_NT[::2])
    threshold = torch.cat([part.flatten() for part in expected.values()]).quantile(sparsity)
    method, own = LossSensitivity(sequences=2, strength=1), survey(DecoderInMemory(tiny_llama), calibration, sparsity)
    found = method.measure(own)
    for block, rate in zip(blocks, found, strict=True):
        part = torch.cat([expected[name].flatten() for name in block.prunables])
        assert rate == pytest.approx(float((part <= threshold).float().mean()), abs=0.005)
    assert max(found) - min(found) > 0.02
    squares = loss_gradients(own, 2).squares
    assert squares.keys() == expected.keys()
    for name, squares_O in squares.items():
        torch.testing.assert_close(squares_O, expected_rows[name], rtol=1e-3, atol=1e-9)
    half = LossSensitivity(sequences=2).measure(survey(DecoderInMemory(tiny_llama), calibration, sparsity))
    assert half == pytest.approx([(rate + sparsity) / 2 for rate in found])


@pytest.mark.parametrize(
    "method",
    [LossSensitivity(sequences=2), Owl(sequences=2), Search(sequences=2, strengths=(0, 1))],
    ids=["sensitivity", "owl", "search"],
)
def test_from_the_disk_the_same_comes_out(method, tiny_llama, tiny_llama_folder, tiny_tokenizer):
    _, calibration = blocks_and_tokens(tiny_llama, tiny_llama_folder, tiny_tokenizer)
    streamed = DecoderOnDisk(locate(str(tiny_llama_folder)))
    found = method.measure(survey(streamed, calibration, activation_budget=0))
    assert found == method.measure(survey(DecoderInMemory(tiny_llama), calibration))
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


def test_only_what_shares_the_sparsity_counts(tiny_llama, tiny_llama_folder, tiny_tokenizer):
    blocks, calibration = blocks_and_tokens(tiny_llama, tiny_llama_folder, tiny_tokenizer)
    decoder = DecoderInMemory(tiny_llama)
    expected, _ = slow_scores(tiny_llama, blocks, calibration.tokens_NT)
    names = [tuple(name for name in block.prunables if "mlp" in name) for block in blocks]
    threshold = torch.cat([expected[name].flatten() for own in names for name in own]).median()
    found = LossSensitivity(sequences=4, strength=1).measure(survey(decoder, calibration, names=names))
    for own, rate in zip(names, found, strict=True):
        part = torch.cat([expected[name].flatten() for name in own])
        assert rate == pytest.approx(float((part <= threshold).float().mean()), abs=0.005)


def test_matrices_that_no_token_reaches_are_left_out_of_the_threshold():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, experts_implementation="eager",
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    calibration = Calibration(torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(1)), "text", 0)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.zero_()  # of equal experts, the same two serve every token
    own = survey(DecoderInMemory(model), calibration)
    measured = loss_gradients(own, 2)
    blocks = own.decoder.blocks
    served = [[name for name in block.prunables if _served(measured, name)] for block in blocks]
    assert len(served[0]) > len(served[1]) == 4 + 2 * 2
    scores = [
        torch.cat([_score(block, name, measured).flatten() for name in names])
        for block, names in zip(blocks, served, strict=True)
    ]
    threshold = torch.cat(scores).quantile(0.5)
    expected = [float((part <= threshold).float().mean()) for part in scores]
    assert LossSensitivity(sequences=2, strength=1).measure(own) == pytest.approx(expected, abs=0.01)


def _served(measured, name):
    return bool(measured.squares[name].any()) and bool(measured.statistics[name].squares_I.any())


def _score(block, name, measured):
    weight_OI, column_I = block.weight(name).detach(), measured.statistics[name].squares_I
    return weight_OI.square() * column_I * measured.squares[name][:, None]


def test_owl_by_hand(tiny_llama, tiny_llama_folder, tiny_tokenizer):
    blocks, calibration = blocks_and_tokens(tiny_llama, tiny_llama_folder, tiny_tokenizer)
    found = Owl(sequences=2, outlier=3.0).measure(survey(DecoderInMemory(tiny_llama), calibration, 0.6))
    inputs = {}
    modules = {tiny_llama.get_submodule(name): name for block in blocks for name in block.prunables}
    handles = [
        module.register_forward_hook(lambda module, x, _: inputs.__setitem__(modules[module], x[0]))
        for module in modules
    ]
    tiny_llama(calibration.tokens_NT[::2])
    for handle in handles:
        handle.remove()
    ratios = []
    for block in blocks:
        scores = [block.weight(n).abs() * inputs[n].square().sum(dim=(0, 1)).sqrt() for n in block.prunables]
        every = torch.cat([score.flatten() for score in scores])  # one mean for the block
        ratios.append(float((every > 3 * every.mean()).float().mean()))
    lowest, highest = min(ratios), max(ratios)
    assert found == pytest.approx([0.6 - 0.16 * (ratio - lowest) / (highest - lowest) for ratio in ratios], abs=1e-3)


@pytest.mark.parametrize("at_once", [1 << 20, 7])
def test_trials_diverge_as_models_do_that_are_pruned_whole(
    at_once, tiny_llama, tiny_llama_folder, tiny_tokenizer, monkeypatch
):
    monkeypatch.setattr(search, "LOGITS", 4 * tiny_llama.config.vocab_size * at_once)
    blocks, calibration = blocks_and_tokens(tiny_llama, tiny_llama_folder, tiny_tokenizer)
    looked_at_NT, held_out_NT = calibration.tokens_NT[::2], calibration.tokens_NT[1::2]
    own = survey(DecoderInMemory(tiny_llama), calibration)
    measured = loss_gradients(own, 2)
    trials = [[0.5] * len(blocks), [0.3 + 0.05 * block.index for block in blocks], [0.0] * len(blocks)]
    found = divergences(own, measured.statistics, trials, held_out_NT)

    inputs = {}
    modules = {tiny_llama.get_submodule(name): name for block in blocks for name in block.prunables}
    handles = [
        module.register_forward_hook(lambda module, x, _: inputs.__setitem__(modules[module], x[0]))
        for module in modules
    ]
    tiny_llama(looked_at_NT)
    for handle in handles:
        handle.remove()
    dense_NTV = tiny_llama(held_out_NT).logits.log_softmax(-1)
    for rates, divergence in zip(trials, found, strict=True):
        pruned = copy.deepcopy(tiny_llama)
        for block, rate in zip(find_blocks(pruned), rates, strict=True):
            for name in block.prunables:
                w_OI = block.weight(name)
                rows, width = w_OI.shape
                places_OI = (w_OI.abs() * inputs[name].square().sum(dim=(0, 1)).sqrt()).argsort(dim=1).argsort(dim=1)
                upto = [round(rate * width * row) for row in range(rows + 1)]
                zeros_O = torch.tensor([after - before for before, after in itertools.pairwise(upto)])
                w_OI[places_OI < zeros_O[:, None]] = 0
        apart_NTV = dense_NTV.exp() * (dense_NTV - pruned(held_out_NT).logits.log_softmax(-1))
        assert divergence == pytest.approx(float(apart_NTV.sum() / held_out_NT.numel()), rel=1e-3, abs=1e-6)
    assert found[0] > 10 * abs(found[2])


def test_search_takes_the_best_of_its_strengths_and_leaves_the_model_alone(
    tiny_llama, tiny_llama_folder, tiny_tokenizer
):
    _, calibration = blocks_and_tokens(tiny_llama, tiny_llama_folder, tiny_tokenizer, samples=6)
    before = copy.deepcopy(tiny_llama.state_dict())
    own = survey(DecoderInMemory(tiny_llama), calibration, 0.6)
    method = Search(sequences=2, strengths=(1.0, 0.5, 0.0))
    chosen = method.measure(own)
    ways = [LossSensitivity(sequences=2, strength=strength).measure(own) for strength in method.strengths]
    statistics = loss_gradients(own, 3).statistics
    trials = [method.bounded(way, own.sizes, 0.6) for way in ways]
    found = divergences(own, statistics, trials, calibration.tokens_NT[1::3])
    assert len(set(found)) == 3
    assert chosen == ways[min(range(3), key=lambda place: found[place])]
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llama.state_dict().items())


def test_search_needs_something_to_hold_out(tiny_llama, tiny_llama_folder, tiny_tokenizer):
    _, calibration = blocks_and_tokens(tiny_llama, tiny_llama_folder, tiny_tokenizer, samples=1)
    with pytest.raises(BesaError, match="at least two --samples"):
        Search().measure(survey(DecoderInMemory(tiny_llama), calibration))


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("sequences=0", "targets.sequences: input should be greater than or equal to 1"),
        ("strengths=[0.5]", "targets.strengths: tuple should have at least 2 items"),
        ("strengths=[0, 2]", "targets.strengths.1: input should be less than or equal to 1"),
    ],
)
def test_settings_of_search_that_are_refused(setting, told):
    with pytest.raises(BesaError, match=told):
        Recipe.load("wanda", 0.5, ["targets.method=search", f"targets.{setting}"])


@pytest.mark.parametrize("method", some_slow(["owl", "sensitivity", "search"], {"owl", "search"}))
def test_a_run_meets_the_sparsity_and_goes_on_after_an_interruption(method, tiny_llama_folder, tmp_path):
    recipe = Recipe.load("wanda", 0.6, [f"targets.method={method}", "targets.sequences=2"])
    text = str(tiny_llama_folder / "calibration.txt")
    sizes = {"samples": 4, "seqlen": 32}
    whole = besa.compress(tiny_llama_folder, recipe, text, out=tmp_path / "whole", **sizes).record
    assert whole.zeros == round(0.6 * whole.weights)
    assert max(block.sparsity for block in whole.blocks) - min(block.sparsity for block in whole.blocks) > 0.02

    def stop(done, blocks, state):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(besa.errors.Interrupted):
        besa.compress(tiny_llama_folder, recipe, text, out=tmp_path / "parts", progress=stop, **sizes)
    assert (tmp_path / "parts.partial" / "targets.json").exists()
    resumed = besa.compress(tiny_llama_folder, recipe, text, out=tmp_path / "parts", resume=True, **sizes).record
    assert resumed.restored_blocks == 2
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "parts")]
    assert files[0] == files[1]


@pytest.mark.parametrize("damage", ["", "[", "{}", '["a"]', None])
def test_targets_that_are_damaged_are_measured_again(damage, tiny_llama_folder, tmp_path):
    from besa.storage.journal import Journal

    journal = Journal(tmp_path)
    journal.keep_targets([0.25, 0.5])
    assert journal.targets == [0.25, 0.5]
    if damage is None:
        (tmp_path / "targets.json").unlink()
    else:
        (tmp_path / "targets.json").write_text(damage)
    assert journal.targets is None


@pytest.mark.parametrize("damage", [b"", b"no tensors", None])
def test_gradients_that_are_damaged_are_measured_again(damage, tmp_path):
    from besa.storage.journal import Journal

    journal = Journal(tmp_path)
    assert journal.gradients is None
    journal.keep_gradients({"a": torch.arange(3.0)})
    assert journal.gradients["a"].tolist() == [0, 1, 2]
    path = tmp_path / "gradients.safetensors"
    path.unlink() if damage is None else path.write_bytes(damage)
    assert journal.gradients is None
