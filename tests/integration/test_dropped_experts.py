"""Whole experts: what is left computes what the whole model computes with these experts masked, in every family."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import besa
from besa import BesaError, Recipe, compress
from besa.cli.show import pruning as show
from besa.errors import Interrupted
from besa.models.experts import find_experts
from besa.models.finding import find_blocks
from besa.models.mixtures import find_mixtures
from besa.record import MixtureRecord
from besa.report.page import render
from besa.report.runs import load_run
from tests.integration.test_families import (
    FAMILIES,
    TOKENS,
    config_of,
    different,
    load,
    random_model,
    saved,
)
from tests.prunable_weights import prunable_weights

MIXTURES = [
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "granitemoe",
    "gpt_oss",
    "qwen2_moe",
    "olmoe",
    "deepseek_v2",
    "phimoe",
    "jetmoe",
    "llama4",
    "qwen3_next",
    "jamba",
]
TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
OF_EACH_FORM = ("mixtral", "deepseek_v3", "gpt_oss", "jetmoe", "llama4")  # the others are like one of these
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


class Masked(TorchFunctionMode):
    """While open, the logits of these rows of these weights (by address) are minus infinity."""

    def __init__(self, gone: dict[int, list[int]]) -> None:
        super().__init__()
        self.gone = gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and (rows := self.gone.get(args[1].data_ptr())):
            y[..., rows] = -torch.inf
        return y


@contextmanager
def masked(model: PreTrainedModel, mixtures: list[MixtureRecord]) -> Iterator[None]:
    """While open, no router of the model chooses the experts that are gone."""
    gone: dict[int, list[int]] = {}
    for block in find_blocks(model):
        parameters = dict(block.module.named_parameters())
        for path in find_experts(block.module).routers:
            for mixture in mixtures:
                name = f"{block.name}.{path}"
                if name.startswith(f"{mixture.name}.") and len(parameters.get(f"{path}.weight", ())) == mixture.experts:
                    gone[parameters[f"{path}.weight"].data_ptr()] = mixture.gone
    for mixture in mixtures:
        for name, buffer in model.get_submodule(mixture.name).named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer[mixture.gone] = -torch.inf
    assert len(gone) == len(mixtures)
    with Masked(gone):
        yield


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS.tokens_NT, use_cache=False).logits


def experts_of(config: Any) -> int:
    return next(int(value) for key in COUNTS if (value := getattr(config, key, None)))


def stored(folder: Path) -> dict[str, list[int]]:
    shapes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no dict
    return shapes


def dropping(*settings: str, sparsity: float = 0.0, recipe: str = "wanda") -> Recipe:
    return Recipe.load(recipe, sparsity, ["experts.method=reap", *settings])


def refusal(*settings: str, model: Any = "mixtral", **changes: Any) -> str:
    given = random_model(config_of(model, **changes)) if isinstance(model, str) else model
    with pytest.raises(BesaError) as caught:
        compress(given, dropping(*settings), TOKENS, tokenizer=AutoTokenizer.from_pretrained(TINY))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    return str(caught.value)


def test_every_mixture_is_tested() -> None:
    routed = set()
    for family in FAMILIES:
        with torch.device("meta"):
            blocks = find_blocks(AutoModelForCausalLM.from_config(config_of(family)))
        if any(prunable.routed for block in blocks for prunable in block.prunables.values()):
            routed.add(family)
    assert set(MIXTURES) == routed


@pytest.mark.parametrize(
    "family",
    [family if family in OF_EACH_FORM else pytest.param(family, marks=pytest.mark.slow) for family in MIXTURES],
)
def test_a_quarter_goes_and_the_rest_computes_what_masked_experts_would(
    family: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    dense = random_model(config_of(family))
    folder = saved(dense, tmp_path / "dense")
    record = compress(folder, dropping(), TOKENS, out=tmp_path / "out", tokenizer=tiny_tokenizer).record
    small = load(tmp_path / "out")
    assert experts_of(small.config.get_text_config()) == 3
    assert all(len(mixture.gone) == 1 and mixture.experts == 4 for mixture in record.mixtures)
    assert record.dropped == dense.num_parameters() - small.num_parameters() > 0
    with masked(dense, record.mixtures):
        expected = logits(dense)
    assert not torch.equal(expected, logits(load(folder)))
    torch.testing.assert_close(logits(small), expected, rtol=1e-4, atol=1e-5)
    # Saved by transformers, the smaller model has the same names and shapes in its files.
    assert stored(tmp_path / "out") == stored(saved(small, tmp_path / "again"))
    # A model in memory loses the same experts in place.
    in_memory = load(folder)
    compress(in_memory, dropping(), TOKENS, tokenizer=tiny_tokenizer)
    assert different(in_memory, small) == set()
    assert experts_of(in_memory.config.get_text_config()) == 3
    torch.testing.assert_close(logits(in_memory), logits(small))


GROUPED = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}


@pytest.mark.parametrize(("settings", "kept"), [(["experts.share=0.3"], 6), (["experts.number=4"], 4)])
def test_groups_of_experts_stay_even(settings: list[str], kept: int, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """0.3 of 8 are 2.4 experts, of which 2 or 4 leave groups of one size."""
    dense = random_model(config_of("deepseek_v3", **GROUPED))
    folder = saved(dense, tmp_path / "dense")
    recipe = dropping(*settings)
    record = compress(folder, recipe, TOKENS, out=tmp_path / "out", tokenizer=tiny_tokenizer).record
    (mixture,) = record.mixtures
    of_groups = [sum(expert // 4 == group for expert in mixture.gone) for group in (0, 1)]
    assert of_groups == [(8 - kept) // 2] * 2
    for group in (0, 1):
        scores = mixture.scores[4 * group : 4 * group + 4]
        gone = [expert - 4 * group for expert in mixture.gone if expert // 4 == group]
        assert sorted(gone) == sorted(sorted(range(4), key=scores.__getitem__)[: len(gone)])
    with masked(dense, record.mixtures):
        expected = logits(dense)
    small = load(tmp_path / "out")
    assert (small.config.n_routed_experts, small.config.n_group) == (kept, 2)
    torch.testing.assert_close(logits(small), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "changes", "words"),
    [
        (
            ["experts.number=3"],
            {},
            "experts.number=3 drops 3 of 4 experts of each block, but at least 1 must go, and 2",
        ),
        (["experts.share=0.01"], {}, "experts.share=0.01 drops 0 of 4 experts"),
        (["experts.number=3"], {"model": "deepseek_v3", **GROUPED}, "drop a multiple of 2"),
        (["experts.number=6"], {"model": "deepseek_v3", **GROUPED}, "and 4 stay for a token to choose from"),
        ([], {"model": "llama"}, "has no experts that a router chooses from"),
    ],
)
def test_what_cannot_be_dropped(settings: list[str], changes: dict[str, Any], words: str) -> None:
    assert words in refusal(*settings, **changes)


def test_how_many_experts_a_token_gets_must_be_known_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(config_of("mixtral"))
    assert find_mixtures(model, find_blocks(model)).least == 2
    vars(model.config)["num_experts_per_tok"] = [1, 3]  # by block, as some families have it
    assert find_mixtures(model, find_blocks(model)).least == 3
    monkeypatch.setattr("besa.models.mixtures.CHOSEN", ("moe_topk",))
    assert "MixtralForCausalLM does not say how many experts a token gets" in refusal(model="mixtral")


def test_targets_need_a_sparsity_of_the_weights_that_stay() -> None:
    with pytest.raises(BesaError, match=r"one number for all blocks: targets\.method=owl needs a sparsity"):
        dropping("targets.method=owl")
    assert dropping("targets.method=owl", sparsity=0.3).targets.measuring


@pytest.mark.parametrize(
    ("recipe", "settings", "sparsity"),
    [
        pytest.param("sparsegpt", [], 0.4, marks=pytest.mark.slow),
        pytest.param("wanda", ["allocation.method=nm"], 0.5, marks=pytest.mark.slow),
        pytest.param("wanda-int4", ["quantization.batch=2"], 0.5, marks=pytest.mark.slow),
        ("besa", ["allocation.steps=4", "allocation.granularity=attn-mlp", "allocation.teacher=pruned"], 0.5),
        pytest.param("best", ["distill.epochs=1"], 0.5, marks=pytest.mark.slow),
    ],
)
def test_what_stays_is_pruned_and_quantised_in_the_same_run(
    recipe: str, settings: list[str], sparsity: float, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = saved(random_model(config_of("qwen3_moe")), tmp_path / "dense")
    chosen = dropping(*settings, recipe=recipe, sparsity=sparsity)
    given = {"tokenizer": tiny_tokenizer, "dequantized": chosen.quantization.coding is not None}
    alone = compress(folder, dropping(), TOKENS, out=tmp_path / "alone", tokenizer=tiny_tokenizer).record
    record = compress(folder, chosen, TOKENS, out=tmp_path / "out", **given).record
    assert [mixture.gone for mixture in record.mixtures] == [mixture.gone for mixture in alone.mixtures]
    whole, small = load(tmp_path / "alone"), load(tmp_path / "out")
    assert record.weights == sum(map(prunable_weights, find_blocks(whole)))
    assert record.zeros == round(sparsity * record.weights)
    assert record.model_sparsity == (record.zeros + record.dropped) / record.model["parameters"]
    matrices = [block.weight(name) for block in find_blocks(small) for name in block.prunables]
    assert sum(int((w_OI == 0).sum()) for w_OI in matrices) == record.zeros
    if recipe == "wanda" and "allocation.method=nm" in settings:
        assert all(bool(((w_OI != 0).reshape(-1, 4).sum(dim=1) == 2).all()) for w_OI in matrices)
    if recipe == "wanda-int4":
        assert all(len(w_I.unique()) <= 16 for w_OI in matrices for w_I in w_OI[:8])
    # The error is against all experts: it is there before a weight is pruned.
    assert 0 < alone.blocks[0].reconstruction_error < record.blocks[0].reconstruction_error


def test_a_stopped_run_goes_on_with_the_same_experts(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(random_model(config_of("mixtral")), tmp_path / "dense")
    recipe = dropping("distill={method: kl, epochs: 1}", sparsity=0.5)
    given = {"tokenizer": tiny_tokenizer}
    compress(folder, recipe, TOKENS, out=tmp_path / "whole", **given)

    def stop(done: int, total: int, state: str) -> None:
        if done == 1 and "scored" not in state:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        compress(folder, recipe, TOKENS, out=tmp_path / "out", progress=stop, **given)
    monkeypatch.setattr("besa.pruning.dropping._choose", None)
    compress(folder, recipe, TOKENS, out=tmp_path / "out", resume=True, **given)
    assert different(load(tmp_path / "whole"), load(tmp_path / "out")) == set()


def test_names_and_keys_are_those_of_the_files(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts that are listed in the files, shards, another name of the key, and layers for further tokens."""
    folder = saved(random_model(config_of("deepseek_v3", num_nextn_predict_layers=1)), tmp_path / "dense")
    tensors = load_file(folder / "model.safetensors")
    listed = [name for name in tensors if ".mlp.experts.3." in name]
    assert listed
    further = {
        name.replace(".layers.1.", ".layers.2."): x.clone() for name, x in tensors.items() if ".layers.1." in name
    }
    save_file(tensors | further, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr("besa.checkpoint.writer.ONE_FILE", 0)
    record = compress(folder, dropping(), TOKENS, out=tmp_path / "out", tokenizer=tiny_tokenizer).record
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == stored(tmp_path / "out").keys() == tensors.keys() - set(listed)
    assert len(set(index.values())) == 3
    assert record.notes == [
        f"{len(further)} tensors of layers that predict further tokens are left out with the experts."
    ]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    changed = {key for key in config | written if config.get(key) != written.get(key)}
    assert changed == {"n_routed_experts", "num_nextn_predict_layers", "besa"}
    assert (written["n_routed_experts"], written["num_nextn_predict_layers"]) == (3, 0)
    (gone,) = record.mixtures[0].gone
    after = {name: x for path in (tmp_path / "out").glob("*.safetensors") for name, x in load_file(path).items()}
    for number, old in enumerate([expert for expert in range(4) if expert != gone]):
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = "model.layers.1.mlp.experts.{}." + f"{part}.weight"
            assert torch.equal(after[name.format(number)], tensors[name.format(old)])


def test_a_key_keeps_the_name_that_the_file_has_for_it(tiny_tokenizer: Any, tmp_path: Path) -> None:
    folder = saved(random_model(config_of("qwen3_moe")), tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    (folder / "config.json").write_text(json.dumps(config))
    compress(folder, dropping(), TOKENS, out=tmp_path / "out", tokenizer=tiny_tokenizer)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_experts"] == 3 and "num_local_experts" not in written


def test_the_fewest_tokens_go_by_frequency(tiny_tokenizer: Any) -> None:
    model = random_model(config_of("olmoe", num_experts=8))
    recipe = Recipe.load("wanda", 0, ["experts={method: frequency, number: 3}"])
    record = compress(model, recipe, TOKENS, tokenizer=tiny_tokenizer).record
    for mixture in record.mixtures:
        assert sum(mixture.tokens) == TOKENS.tokens_NT.numel() * 2
        assert mixture.gone == sorted(sorted(range(8), key=mixture.tokens.__getitem__)[:3])


def test_plan_terminal_card_and_report_say_what_went(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = saved(random_model(config_of("qwen3_moe")), tmp_path / "dense")
    recipe = dropping(sparsity=0.5)
    plan = besa.plan(folder, recipe, samples=4, seqlen=16)
    usual = besa.plan(folder, "wanda", samples=4, seqlen=16)
    record = compress(folder, recipe, TOKENS, out=tmp_path / "out", tokenizer=tiny_tokenizer).record
    assert (plan.experts, plan.mixtures, plan.dropped) == ((4, 3), 2, record.dropped)
    assert (plan.prunable_weights, plan.zeros) == (record.weights, record.zeros)
    assert (plan.parameters, plan.model_sparsity) == (usual.parameters, record.model_sparsity)
    assert plan.forward_passes == usual.forward_passes + 2
    assert plan.checkpoint_bytes == usual.checkpoint_bytes - 4 * record.dropped
    # One expert: gate, up and down of 48 channels, and a row of the router.
    assert record.dropped == 2 * (3 * 48 * 64 + 64)
    words = f"3 of 4 experts stay in each of 2 mixtures: {record.dropped:,} parameters went"
    for shown in (show.pruned(record, tmp_path / "out"), show.planned(plan)):
        console = Console(width=200)
        with console.capture() as captured:
            console.print(shown)
        assert words in captured.get()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"3 of 4 are left in each of 2 mixtures; {record.dropped:,} parameters went with the others" in card
    page = render([load_run(tmp_path / "out")])
    assert "3 of 4 in each of 2 mixtures" in page and "Experts that went" in page
    assert all(mixture.name in page for mixture in record.mixtures)
