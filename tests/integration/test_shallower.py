"""Checkpoints without some of their blocks: plain transformers loads them with equal logits, whatever the family."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel

import besa
from besa import BesaError, Recipe, cli
from besa.checkpoint.shallower import Renumbering
from besa.errors import Interrupted
from besa.models.finding import find_blocks
from besa.models.layers import biases
from tests.integration.test_families import (
    FAMILIES,
    TOKENS,
    config_of,
    load,
    random_model,
    saved,
    stopped_after_a_block,
)
from tests.sweep import TOKENS_NT, small_model

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
TEXT = str(TINY / "calibration.txt")
QUICK = ["gpt2", "gemma3", "llama4"]
DESCRIBED_BY_PERIODS, OTHER_BIASES = "jamba", "jetmoe"
FOUR = {
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "attention_types": [[["global", "local"], 2]],
}


def of_four_blocks(family: str, **changes: Any) -> PreTrainedConfig:
    settings = FAMILIES[family][1]
    changed = {key: value for key, value in FOUR.items() if key in settings}
    if "layer_types" in settings:
        changed["layer_types"] = settings["layer_types"] * 2
    return config_of(family, **changed | changes)


def emptied(model: PreTrainedModel, index: int) -> PreTrainedModel:
    block = find_blocks(model)[index]
    for name in block.prunables:
        block.weight(name).zero_()
    for name in biases(block, block.prunables):
        block.module.get_parameter(name).zero_()
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS.tokens_NT, use_cache=False).logits


def refusal(model: Path, out: Path) -> str:
    with pytest.raises(BesaError) as caught:
        besa.shrink(model, out)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=[] if family in QUICK else [pytest.mark.slow]) for family in FAMILIES],
)
def test_a_family_loses_its_second_block(family: str, tmp_path: Path) -> None:
    """The second of four: where kinds of blocks take turns, those that stay keep theirs."""
    dense = saved(emptied(random_model(of_four_blocks(family)), 1), tmp_path / "dense")
    if family == DESCRIBED_BY_PERIODS:
        assert "whose configuration cannot describe it without blocks 1" in refusal(dense, tmp_path / "small")
        return
    if family == OTHER_BIASES:
        assert "has only zeros and still does something" in refusal(dense, tmp_path / "small")
        return
    done = besa.shrink(dense, tmp_path / "small")
    assert done.blocks == (4, 3) and not done.structures and not done.widths
    before, after = load(dense), load(tmp_path / "small")
    assert torch.equal(logits(after), logits(before))
    kinds = getattr(before.config, "layer_types", None)
    if kinds is not None:
        assert after.config.layer_types == [kinds[0], *kinds[2:]]
    assert len(find_blocks(after)) == 3
    kept = [block.module for block in find_blocks(before) if block.index != 1]
    for old, new in zip(kept, [block.module for block in find_blocks(after)], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
        for name in ("sliding_window", "attention_type", "is_sliding", "use_rope"):
            for part, other in zip(old.modules(), new.modules(), strict=True):
                assert getattr(part, name, None) == getattr(other, name, None)
    prompt_NT = TOKENS.tokens_NT[:1, :4]
    written = [model.generate(prompt_NT, max_new_tokens=4, do_sample=False) for model in (before, after)]
    assert torch.equal(*written)


def test_distilling_leaves_what_is_gone_as_it_is(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Steps are shares of a tensor's size, so biases that are zero stay it, and their block goes on doing nothing."""
    dense = saved(random_model(of_four_blocks("phi")), tmp_path / "dense")
    learning = ["allocation.blocks=2", "distill={method: kl, learns: norms, epochs: 1, rate: 0.01}"]
    recipe = Recipe.load("depth", overrides=learning)
    record = besa.compress(dense, recipe, TOKENS, out=tmp_path / "pruned", tokenizer=tiny_tokenizer).record
    gone = {block.index for block in record.blocks if block.structures == {"blocks": (1, 0)}}
    assert (
        len(gone) == 2 and record.distilling is not None and record.distilling.losses[1] < record.distilling.losses[0]
    )
    for before, after in zip(find_blocks(load(dense)), find_blocks(load(tmp_path / "pruned")), strict=True):
        names = biases(after, after.prunables)
        assert "mlp.fc2.bias" in names
        for name in names:
            learned, was = after.module.get_parameter(name), before.module.get_parameter(name)
            assert not learned.any() if after.index in gone else not torch.equal(learned, was)
    assert besa.shrink(tmp_path / "pruned", tmp_path / "small").blocks == (4, 2)
    assert torch.equal(logits(load(tmp_path / "small")), logits(load(tmp_path / "pruned")))


@pytest.mark.parametrize("family", ["phi", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_what_was_pruned_computes_what_is_left(family: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    dense = saved(random_model(of_four_blocks(family)), tmp_path / "dense")
    recipe = Recipe.load("depth", overrides=["allocation.blocks=2"])
    into = {"out": tmp_path / "pruned", "tokenizer": tiny_tokenizer}
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        besa.compress(dense, recipe, TOKENS, **into, progress=stopped_after_a_block)
    record = besa.compress(dense, recipe, TOKENS, **into, resume=True).record
    assert record.restored_blocks == 1
    gone = [block.index for block in record.blocks if block.structures == {"blocks": (1, 0)}]
    assert len(gone) == 2 and record.sparsity == 0.5
    assert besa.shrink(tmp_path / "pruned", tmp_path / "small").blocks == (4, 2)
    assert torch.equal(logits(load(tmp_path / "small")), logits(load(tmp_path / "pruned")))
    in_memory = load(dense)
    besa.compress(in_memory, recipe, TOKENS, tokenizer=tiny_tokenizer)
    assert torch.equal(logits(in_memory), logits(load(tmp_path / "pruned")))


def test_the_command_line_from_the_recipe_to_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    pruned, small = str(tmp_path / "pruned"), str(tmp_path / "small")
    of = ["--calibration", TEXT, "--samples", "4", "--seqlen", "32"]
    for arguments in (
        ["plan", str(TINY), "--recipe", "depth", "--set", "allocation.blocks=2", *of],
        ["prune", str(TINY), pruned, "--recipe", "depth", "--set", "allocation.blocks=2", *of],
        ["shrink", pruned, small],
    ):
        monkeypatch.setattr(sys, "argv", ["besa", *arguments])
        cli.main()
    shown = capsys.readouterr().out
    assert "6 of 8 blocks stay (gone: blocks 1, 4)" in shown
    assert "blocks from 8 to 6" in shown
    old, new = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("pruned", "small"))
    assert {key for key in old | new if old.get(key) != new.get(key)} == {"num_hidden_layers", "besa"}
    assert new["besa"]["shrunk"] == {"blocks": [8, 6]}
    assert "6 of 8 are left" in (tmp_path / "small" / "README.md").read_text()
    assert set(load_file(tmp_path / "small" / "model.safetensors")) == {
        name
        for name in load_file(TINY / "model.safetensors")
        if not name.startswith(("model.layers.6.", "model.layers.7."))
    }
    assert besa.verify(small).files


def test_blocks_and_channels_go_together(tmp_path: Path) -> None:
    model = emptied(random_model(of_four_blocks("llama")), 2)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, 10:26] = 0
    done = besa.shrink(saved(model, tmp_path / "dense"), tmp_path / "small")
    assert done.blocks == (4, 3) and done.structures == {"ffn": (96, 80)}
    torch.testing.assert_close(logits(load(tmp_path / "small")), logits(model), rtol=1e-4, atol=1e-4)


def test_layers_that_predict_further_tokens_come_after_the_blocks_that_stay(tmp_path: Path) -> None:
    model = emptied(random_model(of_four_blocks("deepseek_v3", num_nextn_predict_layers=1)), 2)
    dense = saved(model, tmp_path / "dense")
    path = dense / "model.safetensors"
    further = {"model.layers.4.eh_proj.weight": torch.ones(3, 3), "vision.layers.4.weight": torch.ones(2)}
    save_file(load_file(path) | further, path, {"format": "pt"})
    besa.shrink(dense, tmp_path / "small")
    written = load_file(tmp_path / "small" / "model.safetensors")
    assert torch.equal(written["model.layers.3.eh_proj.weight"], torch.ones(3, 3))
    assert "vision.layers.4.weight" in written and not any(name.startswith("model.layers.4.") for name in written)
    assert torch.equal(logits(load(tmp_path / "small")), logits(load(dense)))


def test_what_defaults_say_by_block_is_written(tmp_path: Path) -> None:
    """The file may leave kinds of blocks to a rule by their number, which would be wrong for fewer blocks."""
    dense = saved(
        emptied(random_model(of_four_blocks("gemma3", layer_types=None, sliding_window_pattern=2)), 1), tmp_path / "d"
    )
    config = json.loads((dense / "config.json").read_text())
    kinds = config.pop("layer_types")
    (dense / "config.json").write_text(json.dumps(config | {"sliding_window_pattern": 2, "eos_token_id": [1, 2, 3, 4]}))
    assert load(dense).config.layer_types == kinds
    besa.shrink(dense, tmp_path / "small")
    small = load(tmp_path / "small")
    assert small.config.layer_types == [kinds[0], *kinds[2:]] and small.config.eos_token_id == [1, 2, 3, 4]


def test_an_infinite_number_of_the_configuration_is_read(tmp_path: Path) -> None:
    """In config.json, it is an object."""
    dense = saved(emptied(small_model("bamba"), 1), tmp_path / "dense")
    assert {"__float__": "Infinity"} in json.loads((dense / "config.json").read_text())["time_step_limit"]
    besa.shrink(dense, tmp_path / "small")
    before, after = load(dense), load(tmp_path / "small")
    assert after.config.time_step_limit == before.config.time_step_limit
    found, expected = (model(TOKENS_NT, use_cache=False).logits for model in (after, before))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_only_whole_models_that_do_something_are_written(tmp_path: Path) -> None:
    model = random_model(config_of("llama"))
    for index in range(2):
        emptied(model, index)
    assert "has no block that does anything" in refusal(saved(model, tmp_path / "dense"), tmp_path / "small")


@pytest.mark.parametrize(
    ("name", "value", "same"),
    [("layer_idx", 0, True), ("layer_idx", 2, False), ("chunked", False, False), ("window", 4096, False)],
)
def test_settings_of_modules_tell_kinds_of_blocks_apart(name: str, value: int | bool, same: bool) -> None:
    """Block 1 becomes block 0: only its number may follow. A window of None is full attention."""
    before, after = random_model(config_of("llama")), random_model(config_of("llama", num_hidden_layers=1))
    blocks, written = find_blocks(before), find_blocks(after)
    for block in (blocks[1], written[0]):
        block.module.self_attn.chunked, block.module.self_attn.window = True, None
    setattr(written[0].module.self_attn, name, value)
    renumbering = Renumbering(blocks, [0])
    if same:
        renumbering.check_same(written)
    else:
        with pytest.raises(BesaError, match="would be another kind of block as number 0"):
            renumbering.check_same(written)
