"""The Python functions on the tiny Llama, and what the methods are worth beside each other."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from torch.nn.utils import prune
from transformers import (
    AutoModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

import besa
from besa.cli import pruning, studying
from besa.data.mixture import MIX
from besa.errors import Notice
from besa.models.ends import capture_inputs
from besa.models.finding import find_blocks
from besa.observing.losses import reconstruction_error
from besa.pruning.paths import ERROR_SHARE
from besa.report.reproduce import is_shipped
from besa.studies.workspace import Conditions
from tests.prunable_weights import prunable_weights

SAMPLES, SEQLEN, WINDOW = 48, 64, 128
SMALL = LlamaConfig(vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture(scope="module")
def heldout(tiny_llama_folder: Path) -> str:
    return str(tiny_llama_folder / "heldout.txt")


@pytest.fixture(scope="module")
def results(tiny_llama_folder: Path, heldout: str) -> dict[str, tuple[besa.Compressed, float]]:
    """Every shipped recipe at 60 %, with its held-out perplexity."""
    found = {}
    for recipe in ("magnitude", "wanda", "sparsegpt", "besa-layerwise", "besa"):
        result = besa.compress(
            tiny_llama_folder,
            recipe,
            str(tiny_llama_folder / "calibration.txt"),
            sparsity=0.6,
            samples=SAMPLES,
            seqlen=SEQLEN,
        )
        measured = besa.evaluate(result.model, [heldout], window=WINDOW, max_windows=100, tokenizer=result.tokenizer)
        found[recipe] = (result, measured.perplexity["heldout"])
    return found


def test_every_method_meets_the_budget_exactly(results: dict[str, tuple[besa.Compressed, float]]) -> None:
    for result, _ in results.values():
        blocks = find_blocks(result.model)
        zeros = [sum(int((block.weight(name) == 0).sum()) for name in block.prunables) for block in blocks]
        weights = [prunable_weights(block) for block in blocks]
        assert sum(zeros) == round(0.6 * sum(weights)) == result.record.zeros
        assert zeros == [block.zeros for block in result.record.blocks]
        for count, size in zip(zeros, weights, strict=True):
            assert abs(count - 0.6 * size) < 1


def test_methods_rank_as_they_should(results: dict[str, tuple[besa.Compressed, float]]) -> None:
    perplexity = {name: value for name, (_, value) in results.items()}
    assert perplexity["besa"] < 0.97 * perplexity["wanda"]
    assert perplexity["besa-layerwise"] < perplexity["wanda"]  # and row-wise below it on SmolLM2, not on this model
    assert perplexity["sparsegpt"] < perplexity["wanda"]
    assert perplexity["besa"] > 22  # the dense model has 20.8


def test_uniform_prunes_every_row_alike_and_besa_does_not(results: dict[str, tuple[besa.Compressed, float]]) -> None:
    def rates(recipe: str) -> torch.Tensor:
        weight = find_blocks(results[recipe][0].model)[2].weight("model.layers.2.mlp.up_proj")
        return (weight == 0).double().mean(dim=1)

    assert rates("wanda").max() - rates("wanda").min() < 2 / 96
    assert rates("besa").std() > 0.01
    layer = rates("besa-layerwise")
    assert layer.max() - layer.min() < 2 / 96
    assert abs(layer.mean() - 0.6) > 0.002


def test_recorded_error_is_that_of_the_written_model(
    results: dict[str, tuple[besa.Compressed, float]], tiny_llama_folder: Path, tiny_llama: torch.nn.Module
) -> None:
    from besa.data.calibration import sample

    result, _ = results["besa"]
    tokens = sample(str(tiny_llama_folder / "calibration.txt"), result.tokenizer, SAMPLES, SEQLEN, 0).tokens_NT
    outputs = []
    for model in (result.model, tiny_llama):
        blocks = find_blocks(model)
        x_NTC = torch.cat(list(capture_inputs(model, blocks, tokens[::ERROR_SHARE], 4)))
        outputs.append([])
        for block in blocks:
            block.run(x_NTC, 4, into=x_NTC)
            outputs[-1].append(x_NTC.clone())
    for record, pruned_NTC, dense_NTC in zip(result.record.blocks, *outputs, strict=True):
        start = slice(0, SEQLEN // 2)
        expected = float(reconstruction_error(pruned_NTC[:, start], dense_NTC[:, start]))
        assert record.reconstruction_error == pytest.approx(expected, rel=1e-3)


def test_zero_sparsity_changes_no_bit(shallow_llama_folder: Path, shallow_llama: torch.nn.Module) -> None:
    for recipe in ("wanda", "besa", "sparsegpt", "magnitude"):
        result = besa.compress(
            shallow_llama_folder,
            recipe,
            str(shallow_llama_folder / "calibration.txt"),
            sparsity=0,
            samples=4,
            seqlen=32,
        )
        for name, tensor in shallow_llama.state_dict().items():
            assert torch.equal(tensor, result.model.state_dict()[name]), (recipe, name)


def test_pruning_to_disk_is_pruning_in_memory(shallow_llama_folder: Path, tmp_path: Path) -> None:
    """With `out` the model stays on the disk, one block in memory at a time, and the result is the same bit by bit."""
    settings = {"calibration": str(shallow_llama_folder / "calibration.txt"), "samples": 8, "seqlen": 64}
    for recipe in ("besa", "sparsegpt"):
        whole = besa.compress(shallow_llama_folder, recipe, **settings)
        streamed = besa.compress(shallow_llama_folder, recipe, out=tmp_path / recipe, **settings)
        state = streamed.model.state_dict()
        assert state.keys() == whole.model.state_dict().keys()
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, state[name]), (recipe, name)
        timeless = [
            [block.model_copy(update={"seconds": 0.0, "phases": {}}) for block in run.record.blocks]
            for run in (whole, streamed)
        ]
        assert timeless[0] == timeless[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["besa", "sparsegpt"]


def test_the_model_is_loaded_from_out_when_asked_for(tiny_llama_folder: Path, tmp_path: Path) -> None:
    calibration = str(tiny_llama_folder / "calibration.txt")
    result = besa.compress(tiny_llama_folder, "wanda", calibration, out=tmp_path / "o", samples=4, seqlen=32)
    (tmp_path / "o").rename(tmp_path / "moved")
    with pytest.raises(besa.BesaError, match="/o"):
        _ = result.model
    (tmp_path / "moved").rename(tmp_path / "o")
    model = result.model
    assert int((model.model.layers[7].mlp.down_proj.weight == 0).sum()) == 96 * 128
    assert result.model is model
    assert besa.compress(tiny_llama_folder, "wanda", calibration, samples=4, seqlen=32).out is None


@pytest.mark.parametrize("recipe", ["besa", "magnitude"])
def test_activations_in_a_file_change_no_bit(shallow_llama_folder: Path, recipe: str) -> None:
    settings = {"calibration": str(shallow_llama_folder / "calibration.txt"), "samples": 9, "seqlen": 64, "batch": 2}
    within = besa.compress(shallow_llama_folder, recipe, **settings)
    above = besa.compress(shallow_llama_folder, recipe, activation_budget=1, **settings)
    for name, tensor in within.model.state_dict().items():
        assert torch.equal(tensor, above.model.state_dict()[name]), name


def test_a_run_with_few_sequences_says_how_it_learned(shallow_llama_folder: Path) -> None:
    """As if its settings had been asked for, and it is still the recipe that ships."""
    settings = {"calibration": str(shallow_llama_folder / "calibration.txt"), "samples": 4, "seqlen": 32}
    whole = ["allocation.crop=1", "allocation.steps=44", "allocation.travel=6"]
    few = besa.compress(shallow_llama_folder, "besa", **settings)
    asked = besa.compress(shallow_llama_folder, besa.Recipe.load("besa", overrides=whole), **settings)
    assert few.record.recipe == asked.record.recipe
    assert is_shipped(few.record)
    for name, tensor in few.model.state_dict().items():
        assert torch.equal(tensor, asked.model.state_dict()[name]), name


def test_exceptions_are_heeded(tiny_llama_folder: Path) -> None:
    recipe = besa.Recipe.load("besa").with_exceptions(["*.q_proj", "model.layers.0.*"], ["*.down_proj=0.25"])
    calibration = str(tiny_llama_folder / "calibration.txt")
    result = besa.compress(tiny_llama_folder, recipe, calibration, samples=4, seqlen=32)
    common = zeros = 0
    for block in find_blocks(result.model):
        for name in block.prunables:
            count = int((block.weight(name) == 0).sum())
            if block.index == 0 or name.endswith("q_proj"):
                assert count == 0
            elif name.endswith("down_proj"):
                assert count == 96 * 256 // 4
            else:
                common, zeros = common + block.weight(name).numel(), zeros + count
    assert zeros == round(0.5 * common)
    assert result.record.blocks[0].linears == []
    assert result.record.weights == common + 7 * 96 * 256  # what is skipped is not counted


def test_pruning_a_pruned_model_goes_on_from_its_zeros(shallow_llama_folder: Path, tmp_path: Path) -> None:
    settings = {"calibration": str(shallow_llama_folder / "calibration.txt"), "samples": 8, "seqlen": 64}
    first = besa.compress(shallow_llama_folder, "besa", out=tmp_path / "half", sparsity=0.5, **settings)
    zero = {n: p == 0 for n, p in first.model.state_dict().items() if n.endswith("_proj.weight")}
    second = besa.compress(tmp_path / "half", "besa", sparsity=0.7, **settings)
    assert second.record.zeros == round(0.7 * second.record.weights)
    for name, mask in zero.items():
        assert bool((second.model.state_dict()[name][mask] == 0).all())
    with pytest.raises(besa.BesaError, match="zeros already"):
        besa.compress(tmp_path / "half", "besa", sparsity=0.3, **settings)


def test_blocks_of_a_pruned_model_keep_their_zeros_or_are_refused_before_the_work(
    shallow_llama_folder: Path, tmp_path: Path
) -> None:
    settings = {"calibration": str(shallow_llama_folder / "calibration.txt"), "samples": 16, "seqlen": 64}
    uneven = besa.Recipe.load("fast", 0.5, ["targets.strength=1", "reconstruction.method=none"])
    first = besa.compress(shallow_llama_folder, uneven, out=tmp_path / "half", **settings)
    zero = {n: p == 0 for n, p in first.model.state_dict().items() if n.endswith("_proj.weight")}
    done: list[float] = []

    def progress(blocks: float, total: float, note: str = "") -> None:
        done.append(blocks)

    for recipe, told in (
        (
            besa.Recipe.load("wanda", 0.52),
            r"24,576 weights of model\.layers\.\d\.mlp\.\w+_proj have [\d,]+ zeros already",
        ),
        (besa.Recipe.load("besa", 0.52), r"101,376 weights of model\.layers\.\d\.self_attn\.q_proj and 6 more have"),
        (besa.Recipe.load("fast", 0.48), r"304,128 weights of the pruned matrices have 152,064 zeros already"),
    ):
        with pytest.raises(besa.BesaError, match=told):
            besa.compress(tmp_path / "half", recipe, progress=progress, **settings)
    assert set(done) == {0}
    again = besa.Recipe.load("fast", 0.52, ["reconstruction.method=none"])
    second = besa.compress(tmp_path / "half", again, **settings)
    assert second.record.zeros == round(0.52 * second.record.weights)
    for name, mask in zero.items():
        assert bool((second.model.state_dict()[name][mask] == 0).all())


def test_bfloat16_runs_and_is_written_as_bfloat16(shallow_llama_folder: Path, tmp_path: Path) -> None:
    calibration = str(shallow_llama_folder / "calibration.txt")
    result = besa.compress(
        shallow_llama_folder, "besa", calibration, out=tmp_path / "o", dtype="bfloat16", samples=8, seqlen=64
    )
    assert result.model.dtype == torch.bfloat16
    assert result.record.zeros == round(0.5 * result.record.weights)
    assert json.loads((tmp_path / "o" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_loaded_model_is_pruned_in_place(
    tiny_llama: torch.nn.Module, tiny_tokenizer, tiny_llama_folder: Path
) -> None:
    calibration = str(tiny_llama_folder / "calibration.txt")
    with pytest.raises(besa.BesaError, match="tokenizer"):
        besa.compress(tiny_llama, "wanda", calibration, samples=4, seqlen=32)
    result = besa.compress(tiny_llama, "wanda", calibration, samples=4, seqlen=32, tokenizer=tiny_tokenizer)
    assert result.model is tiny_llama
    assert int((tiny_llama.model.layers[0].mlp.up_proj.weight == 0).sum()) == 256 * 48


def test_the_sparsity_of_a_model_in_memory_is_that_of_its_weights(
    tiny_tokenizer, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    """Its configuration may tell of an earlier run, or of zeros that training has filled."""
    text = str(tiny_llama_folder / "calibration.txt")

    def measured(model: PreTrainedModel | Path) -> float | None:
        given = None if isinstance(model, Path) else tiny_tokenizer
        return besa.evaluate(model, [text], window=32, max_windows=1, tokenizer=given).sparsity

    few = {"samples": 2, "seqlen": 16}
    skip = besa.Recipe.load("wanda", overrides=["skip=['*.mlp.*']"])
    besa.compress(tiny_llama_folder, skip, text, out=tmp_path / "half", **few)
    assert measured(tmp_path / "half") == 0.5  # of the matrices that were pruned
    model = besa.load(tmp_path / "half")
    besa.compress(model, "magnitude", text, sparsity=0.75, tokenizer=tiny_tokenizer, **few)
    model.save_pretrained(tmp_path / "again")
    tiny_tokenizer.save_pretrained(tmp_path / "again")
    assert model.config.besa == {"recipe": "magnitude", "sparsity": 0.75}
    assert measured(model) == measured(tmp_path / "again") == 0.75
    for parameter in model.parameters():
        parameter.data += 1e-3
    model.save_pretrained(tmp_path / "trained")
    tiny_tokenizer.save_pretrained(tmp_path / "trained")
    assert measured(model) == measured(tmp_path / "trained") < 0.01


def test_dropout_of_a_model_in_training_plays_no_part(tiny_tokenizer, tiny_llama_folder: Path) -> None:
    text = str(tiny_llama_folder / "calibration.txt")
    found = {}
    for training in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SMALL.to_dict() | {"attention_dropout": 0.5})).train(training)
        besa.compress(model, "besa", text, samples=4, seqlen=32, tokenizer=tiny_tokenizer)
        measured = besa.evaluate(model, [text], window=32, max_windows=2, tokenizer=tiny_tokenizer)
        assert measured.sparsity == pytest.approx(0.5, abs=1e-4)  # counted: nothing but its weights tells it from dense
        said = besa.generate(model, "The", max_new_tokens=8, tokenizer=tiny_tokenizer)
        found[training] = ({name: own.clone() for name, own in model.state_dict().items()}, measured.perplexity, said)
    assert found[True][1:] == found[False][1:]
    assert all(torch.equal(tensor, found[True][0][name]) for name, tensor in found[False][0].items())


def parametrized() -> PreTrainedModel:
    model = LlamaForCausalLM(SMALL)
    prune.random_unstructured(model.model.layers[1].mlp.up_proj, "weight", 0.5)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.compile(LlamaForCausalLM(SMALL)), "model should be .* PreTrainedModel, not OptimizedModule"),
        (lambda: None, "model should be .* PreTrainedModel, not None"),
        (lambda: LlamaForCausalLM(SMALL).to("meta"), "model.embed_tokens.weight of LlamaForCausalLM has no memory"),
        (parametrized, "weight of model.layers.1.mlp.up_proj is computed from other parameters"),
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=1024, hidden_size=32, num_hidden_layers=1)), "no attention"),
    ],
)
def test_what_cannot_be_pruned_in_memory_is_told_in_a_sentence(make, reason, tiny_tokenizer, tiny_llama_folder) -> None:
    text = str(tiny_llama_folder / "calibration.txt")
    with pytest.raises(besa.BesaError, match=reason):
        besa.compress(make(), "wanda", text, samples=2, seqlen=16, tokenizer=tiny_tokenizer)


def test_a_model_without_a_head_is_pruned_and_written(tiny_tokenizer, tiny_llama_folder: Path, tmp_path: Path) -> None:
    text = str(tiny_llama_folder / "calibration.txt")
    model = LlamaForCausalLM(SMALL).model
    besa.compress(model, "wanda", text, samples=2, seqlen=16, tokenizer=tiny_tokenizer, out=tmp_path / "out")
    written = AutoModel.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in model.state_dict().items())
    assert int((written["layers.0.mlp.up_proj.weight"] == 0).sum()) == 32 * 48 // 2


def test_a_model_of_the_caller_stays_as_it_was_but_for_its_zeros(shallow_llama, tiny_tokenizer, shallow_llama_folder):
    """Mode, gradients, what learns, device and configuration."""
    model, frozen = shallow_llama, "model.layers.1.self_attn.q_proj.weight"
    model.requires_grad_(True)
    model.train()
    model.model.layers[2].eval()
    model.get_parameter(frozen).requires_grad_(False)
    model(input_ids=torch.arange(2, 12)[None]).logits.sum().backward()
    config, learning = model.config.to_dict(), {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    text = str(shallow_llama_folder / "heldout.txt")
    first = besa.evaluate(model, [text], tokenizer=tiny_tokenizer, window=64, max_windows=2).perplexity
    besa.generate(model, "One day", tokenizer=tiny_tokenizer, max_new_tokens=3)
    calibration = str(shallow_llama_folder / "calibration.txt")
    besa.compress(model, "besa", calibration, tokenizer=tiny_tokenizer, samples=2, seqlen=32)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == learning
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == identities
    assert model.config.to_dict() == config
    for name, parameter in model.named_parameters():
        before = gradients[name]
        assert (parameter.grad is None) == (before is None)
        assert before is None or torch.equal(parameter.grad, before)
    assert (model.model.layers[0].mlp.up_proj.weight == 0).double().mean() > 0.3
    assert first["heldout"] > 1


def test_measuring_on_what_a_model_was_calibrated_on_is_said(
    shallow_llama_folder: Path, heldout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = str(shallow_llama_folder / "calibration.txt")
    besa.compress(shallow_llama_folder, "magnitude", own, out=tmp_path / "pruned", samples=2, seqlen=16)

    def notes(folder: Path, texts: list[str]) -> list[str]:
        return besa.evaluate(folder, texts, window=32, max_windows=1).notes

    said = "The model was calibrated on documents of calibration: other texts tell more of what is left."
    with pytest.warns(Notice, match=said):
        assert notes(tmp_path / "pruned", [heldout, own]) == [said]
    assert not notes(tmp_path / "pruned", [heldout]) and not notes(shallow_llama_folder, [own])
    monkeypatch.chdir(shallow_llama_folder)  # the same file by another path, and as a test set
    for texts, data in [(["calibration.txt"], {}), (["wikitext2"], {"wikitext2": "calibration.txt"})]:
        measured = besa.evaluate(tmp_path / "pruned", texts, data=data, window=32, max_windows=1)
        assert measured.notes == [said.replace("calibration:", f"{Path(texts[0]).stem}:")]
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "calibration.txt").write_text("Another text of that name. " * 50)
    assert not notes(tmp_path / "pruned", [str(elsewhere / "calibration.txt")])
    besa.compress(".", "magnitude", "calibration.txt", out=tmp_path / "other", samples=2, seqlen=16)
    monkeypatch.chdir(elsewhere)  # where the path of the record means nothing, or another file
    assert notes(tmp_path / "other", [own]) == [said]
    assert not notes(tmp_path / "other", ["calibration.txt"])
    besa.compress(tmp_path / "pruned", "magnitude", heldout, out=tmp_path / "again", sparsity=0.6, samples=2, seqlen=16)
    assert notes(tmp_path / "again", [own]) == [said]  # of the run before
    (tmp_path / "pruned" / "besa_run.json").write_text("no record")
    assert not notes(tmp_path / "pruned", [own])


def test_what_is_wrong_with_tasks_is_told_before_texts_are_measured(tiny_llama_folder: Path, heldout: str) -> None:
    def progress(*done: object) -> None:
        pytest.fail(f"something was measured: {done}")

    with pytest.raises(besa.BesaError, match="--bos yes: the tokenizer puts no token before a text"):
        besa.evaluate(tiny_llama_folder, [heldout], tasks=["piqa"], bos="yes", window=32, progress=progress)


def test_all_ways_to_prune_calibrate_on_the_same_text() -> None:
    defaults = {
        inspect.signature(function).parameters["calibration"].default
        for function in (
            besa.compress,
            besa.plan,
            pruning.prune,
            pruning.plan_command,
            studying.compare_command,
            Conditions,
        )
    }
    assert defaults == {MIX}


def test_settings_that_are_no_recipe_are_refused(tiny_llama_folder: Path) -> None:
    with pytest.raises(besa.BesaError, match=r"^compress: recipe should be an instance of Recipe or .*, not \{"):
        besa.compress(tiny_llama_folder, {"name": "wanda"})
