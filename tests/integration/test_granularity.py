"""Pruning at every granularity: exact budgets of the right linears, better the more share one, resumed as begun."""

from pathlib import Path

import pytest
import torch

import besa
from besa.methods.recipe import Recipe
from besa.models.ends import capture_inputs
from besa.models.finding import find_blocks
from besa.models.units import Granularity, sharing, units
from besa.observing.losses import reconstruction_error
from besa.pruning.paths import ERROR_SHARE
from besa.storage.journal import Journal

GRANULARITIES: tuple[Granularity, ...] = ("linear", "attn-mlp", "block", "two-blocks")
SAMPLES, SEQLEN = 8, 32


def recipe(granularity: str, *more: str) -> Recipe:
    return Recipe.load("besa", 0.6, [f"allocation.granularity={granularity}", "allocation.steps=12", *more])


def prune(folder: Path, granularity: str, *more: str, **settings) -> besa.Compressed:
    text = str(folder / "calibration.txt")
    return besa.compress(folder, recipe(granularity, *more), text, samples=SAMPLES, seqlen=SEQLEN, **settings)


@pytest.fixture(scope="module")
def results(tiny_llama_folder: Path) -> dict[str, besa.Compressed]:
    return {granularity: prune(tiny_llama_folder, granularity) for granularity in GRANULARITIES}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_budgets_are_met_exactly_at_their_granularity(
    results: dict[str, besa.Compressed], granularity: Granularity
) -> None:
    blocks = find_blocks(results[granularity].model)
    zeros = {name: int((block.weight(name) == 0).sum()) for block in blocks for name in block.prunables}
    sizes = {name: block.weight(name).numel() for block in blocks for name in block.prunables}
    assert sum(zeros.values()) == round(0.6 * sum(sizes.values())) == results[granularity].record.zeros
    groups = [group for unit in units(blocks, granularity) for group in sharing(unit, granularity)]
    assert len(groups) == {"linear": 56, "attn-mlp": 16, "block": 8, "two-blocks": 4}[granularity]
    for group in groups:
        assert abs(sum(zeros[n] for n in group) - 0.6 * sum(sizes[n] for n in group)) < 1
    free = max(abs(zeros[name] / sizes[name] - 0.6) for name in zeros)
    assert free < 1e-3 if granularity == "linear" else free > 0.02  # and inside a group rates are learned


def test_coarser_granularity_keeps_the_output_closer(results: dict[str, besa.Compressed]) -> None:
    """Fig. 5 of the paper: errors fall from linears over attention and MLP, and blocks, to pairs of blocks."""
    last = [results[granularity].record.blocks[-1].reconstruction_error for granularity in GRANULARITIES]
    assert last == sorted(last, reverse=True)
    assert last[-1] < 0.8 * last[0]


def test_rows_of_a_linear_differ_where_every_linear_has_a_budget(results: dict[str, besa.Compressed]) -> None:
    weight = find_blocks(results["linear"].model)[2].weight("model.layers.2.mlp.up_proj")
    assert (weight == 0).double().mean(dim=1).std() > 0.01


def test_errors_within_a_pair_of_blocks_are_those_of_the_written_model(
    results: dict[str, besa.Compressed], tiny_llama_folder: Path, tiny_llama: torch.nn.Module
) -> None:
    from besa.data.calibration import sample

    result = results["two-blocks"]
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
        assert bool(record.losses) == (record.index % 2 == 1)


@pytest.mark.parametrize(("granularity", "more"), [("attn-mlp", ("allocation.teacher=pruned",)), ("two-blocks", ())])
def test_pruning_to_disk_is_pruning_in_memory(
    granularity: str, more: tuple[str, ...], tiny_llama_folder: Path, tmp_path: Path
) -> None:
    steps = ("allocation.steps=2", *more)
    whole = prune(tiny_llama_folder, granularity, *steps)
    streamed = prune(tiny_llama_folder, granularity, *steps, out=tmp_path / "out")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, streamed.model.state_dict()[name]), name


def test_a_run_that_stops_within_a_pair_redoes_the_pair(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(tiny_llama_folder, "two-blocks", "allocation.steps=2", out=tmp_path / "whole")
    keep = Journal.keep

    def kept(self: Journal, tensors, record) -> None:
        if record.index == 3:  # the second of its pair
            raise KeyboardInterrupt
        keep(self, tensors, record)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "keep", kept)
        with pytest.raises(BaseException, match="3 finished blocks are kept"):
            prune(tiny_llama_folder, "two-blocks", "allocation.steps=2", out=tmp_path / "out")
    resumed = prune(tiny_llama_folder, "two-blocks", "allocation.steps=2", out=tmp_path / "out", resume=True)
    assert resumed.record.restored_blocks == 2
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_plans_know_what_granularity_takes(tiny_llama_folder: Path) -> None:
    sizes = {"samples": 64, "seqlen": 64}
    planned = {g: besa.plan(tiny_llama_folder, recipe(g, "allocation.steps=64"), **sizes) for g in GRANULARITIES}
    assert {g: plan.forward_passes for g, plan in planned.items()} == {
        "linear": 2.03125 + 1.5,  # no teacher
        "attn-mlp": 4 + 0.5 + 1.5,  # a second teacher, and steps of its own for attention
        "block": 4,
        "two-blocks": 4,
    }
    streams = {g: plan.activation_bytes / (64 * 64 * 96 * 4) for g, plan in planned.items()}
    assert streams == {"linear": 1.03125, "attn-mlp": 2, "block": 1.5, "two-blocks": 1.5}
    assert planned["two-blocks"].memory_bytes > planned["block"].memory_bytes
