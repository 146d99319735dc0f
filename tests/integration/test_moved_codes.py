"""Weights that move and become codes: budgets, grids, files, packing, and runs that go on."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import besa
from besa import BesaError, Recipe
from besa.api import Compressed
from besa.checkpoint import opening
from besa.counting.masks import rank
from besa.errors import Interrupted
from besa.methods.allocation import RankedLinear
from besa.models.finding import find_blocks
from besa.models.loading import load_model
from besa.models.source import locate
from besa.models.streaming import DecoderInMemory
from besa.pruning import preparing, quantizing
from besa.storage import snapshots
from tests.slowly import some_slow

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
TEXT = str(TINY / "calibration.txt")
SIZES = {"samples": 17, "seqlen": 32}
DENSE = ["*.layers.[2-7].*"]  # for speed
FEW = ["quantization.group=32", "distill.epochs=1", "distill.cross_entropy=0"]  # 14 sequences would be learned by heart


def recipe(*overrides: str, name: str = "best-int4") -> Recipe:
    return Recipe.load(name, overrides=[*FEW, *overrides]).with_exceptions(DENSE, [])


def prunable(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the quantised linears, as anybody loads them; the first forward pass makes them."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(f".layers.{index}." in name for index in (0, 1))
    }


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    """A run that nobody stopped."""
    out = tmp_path_factory.mktemp("moved") / "out"
    return besa.compress(TINY, recipe(), TEXT, out=out, **SIZES)


def test_budgets_are_exact_and_values_are_on_the_grid(moved: Compressed) -> None:
    assert moved.out is not None
    weights = prunable(moved.out)
    assert len(weights) == 2 * 7
    zeros = sum(int((w_OI == 0).sum()) for w_OI in weights.values())
    assert zeros == moved.record.zeros == moved.record.weights // 2
    for w_OI in weights.values():
        for part in w_OI.reshape(-1, 32)[:50]:
            assert part.unique().numel() <= 16
    settings = json.loads((moved.out / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "pack-quantized"
    assert settings["config_groups"]["group_0"]["weights"]["num_bits"] == 4


def test_the_model_learns_through_the_rounding(moved: Compressed) -> None:
    """The held-out loss is that of the codes as written: lower than before, and of what is stored."""
    distilling = moved.record.distilling
    assert distilling is not None
    assert distilling.losses[-1] < distilling.losses[0]


def test_a_model_in_memory_becomes_the_same(moved: Compressed, tmp_path: Path) -> None:
    """And the numbers that codes stand for, where they are asked for."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    out = tmp_path / "dequantized"
    record = besa.compress(model, recipe(), TEXT, out=out, tokenizer=tokenizer, dequantized=True, **SIZES).record
    assert record.distilling is not None
    assert moved.record.distilling is not None
    assert record.distilling.losses == moved.record.distilling.losses
    assert moved.out is not None
    stored, modules = prunable(out), dict(model.named_modules())
    for name, w_OI in prunable(moved.out).items():
        assert torch.equal(w_OI, stored[name]), name
        assert torch.equal(w_OI, modules[name].weight), name


def test_a_packed_checkpoint_has_the_same_bits(moved: Compressed, tmp_path: Path) -> None:
    assert moved.out is not None
    besa.pack(moved.out, tmp_path / "packed")
    besa.unpack(tmp_path / "packed", tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (moved.out, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(("stop", "loaded"), [("block", False), ("block", True), ("step", False), ("epoch", False)])
@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(
    stop: str, loaded: bool, moved: Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a block, within an epoch and at its end: the files are the same to the bit. So they are of a model that is
    loaded whole, as .gguf files are: it keeps what is put into its blocks."""
    if loaded:
        monkeypatch.setattr(
            opening, "_decoder_of_folder", lambda source, dtype, _: DecoderInMemory(load_model(source, dtype))
        )
    monkeypatch.setattr(snapshots, "EVERY", 0.0)
    monkeypatch.setattr(snapshots, "SHARE", math.inf)
    told = 0

    def progress(done: float, total: float, note: str = "") -> None:
        nonlocal told
        distilling = note.startswith("distilling")
        told += distilling or (stop == "block" and note.startswith("error"))
        if told == {"block": 2, "step": 3, "epoch": 15}[stop]:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        besa.compress(TINY, recipe(), TEXT, out=out, progress=progress, **SIZES)
    record = besa.compress(TINY, recipe(), TEXT, out=out, resume=True, **SIZES).record
    assert record.distilling is not None
    assert moved.record.distilling is not None
    assert record.distilling.losses == moved.record.distilling.losses
    assert moved.out is not None
    assert (out / "model.safetensors").read_bytes() == (moved.out / "model.safetensors").read_bytes()


def test_without_pruning_the_zeros_are_those_of_rounding(tmp_path: Path) -> None:
    """Whole rows in eight bits, and no distilling."""
    chosen = recipe("distill={method: none}", "quantization.group=null", "targets.method=uniform", name="best-int8").at(
        0
    )
    result = besa.compress(TINY, chosen, TEXT, out=tmp_path / "out", **SIZES)
    weights = prunable(tmp_path / "out")
    zeros = sum(int((w_OI == 0).sum()) for w_OI in weights.values())
    assert zeros == result.record.zeros
    assert 0 < zeros < 0.1 * result.record.weights
    assert all(part.unique().numel() <= 256 for w_OI in weights.values() for part in w_OI[:20])


def test_zeros_go_first_then_what_rounds_to_zero_by_importance() -> None:
    """Of the weights 0.01 and less, which round to zero, the least important go, wherever they are in their row."""
    w_OI = torch.tensor([[0.01, 1.0, -0.008, 0.0, 0.9, 0.004, -0.7, 0.8]])
    linear = RankedLinear(w_OI, w_OI.abs(), rank(w_OI.abs(), w_OI))
    q_OI = torch.where(w_OI.abs() < 0.05, 0, w_OI)
    assert quantizing._zeros_first(linear, q_OI, None).tolist() == [[3, 7, 2, 0, 6, 1, 4, 5]]
    assert quantizing._zeros_first(linear, q_OI, 4).tolist() == [[4, 6, 2, 0, 7, 1, 3, 5]]


@pytest.mark.parametrize("allocation", some_slow(["uniform", "besa", "sensitivity"], {"uniform", "sensitivity"}))
def test_zeros_that_the_model_has_count_where_little_is_pruned(shallow_llama_folder: Path, allocation: str) -> None:
    """In two bits, more weights round to zero than the sparsity asks for."""
    model = load_model(locate(str(shallow_llama_folder)))
    generator = torch.Generator().manual_seed(0)
    for block in find_blocks(model):
        for name in block.prunables:
            w_OI = block.weight(name).detach()
            w_OI[torch.rand(w_OI.shape, generator=generator) < 0.05] = 0
    settings = ["quantization={method: moved, bits: 2, group: 32}", f"allocation.method={allocation}"]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    record = besa.compress(model, Recipe.load("wanda", 0.15, settings), TEXT, tokenizer=tokenizer, **SIZES).record
    assert record.zeros == round(0.15 * record.weights)


def test_what_cannot_be_codes_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "measure", lambda *_: pytest.fail("it is measured"))
    with pytest.raises(BesaError, match="no whole number of groups of 128"):
        besa.compress(TINY, recipe("quantization.group=128"), TEXT, **SIZES)


def test_what_does_not_go_together() -> None:
    with pytest.raises(BesaError, match=r"finetune.*set finetune\.method=none"):
        recipe("finetune.method=adam")
    with pytest.raises(BesaError, match="no whole number of groups of 128"):
        besa.compress(TINY, recipe("quantization.group=128"), TEXT, **SIZES)
