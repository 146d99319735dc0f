"""What a plan says, against what a run then does."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import FalconConfig, LlamaConfig, MixtralConfig, MixtralForCausalLM

import besa
from benchmarks.peers import gguf_files
from besa import Calibration
from besa.cli.show import pruning as show
from besa.errors import BesaError, Notice
from besa.methods.recipe import Recipe
from besa.models.finding import find_blocks
from besa.models.loading import read_config, skeleton
from besa.models.source import locate
from besa.models.units import units
from besa.planning import explain, process
from besa.planning.shapes import _LiveBytes, learn_arguments, shared_inputs
from besa.record import RunRecord
from besa.report import load_run, render
from besa.system import memory
from tests import pretend

LLAMA_70B = LlamaConfig(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    dtype="float16",
)
FALCON_180B = FalconConfig(
    vocab_size=65024,
    hidden_size=14848,
    num_hidden_layers=80,
    num_attention_heads=232,
    num_kv_heads=8,
    new_decoder_architecture=True,
    dtype="bfloat16",
)
HEAD = 1024 / (8 * (101_376 / 96 + 2))  # of the tiny Llama, as a share of its blocks, whose widths are multiples of 96
TUNED = ["finetune={method: adam, epochs: 8}", "distill.method=none"]


def test_counts_are_those_of_the_run(tiny_llama_folder: Path, tmp_path: Path) -> None:
    sizes = {"samples": 16, "seqlen": 32, "sparsity": 0.6}
    planned = besa.plan(tiny_llama_folder, "besa", out=tmp_path / "out", **sizes)
    text = str(tiny_llama_folder / "calibration.txt")
    record = besa.compress(tiny_llama_folder, "besa", text, out=tmp_path / "out", **sizes).record
    assert (planned.prunable_weights, planned.zeros) == (record.weights, record.zeros)
    assert planned.model_sparsity == record.model_sparsity == record.zeros / record.model["parameters"]
    assert planned.dense == record.dense == {}
    assert planned.architecture == record.model["architecture"]
    assert (planned.blocks, planned.parameters) == (len(record.blocks), record.model["parameters"])
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert planned.checkpoint_bytes <= written < planned.checkpoint_bytes + 20_000  # the header
    assert planned.activation_bytes == 2 * 16 * 32 * 96 * 4  # so few sequences are whole on the dense path, too
    assert planned.forward_passes == 1 + 2 + 3 * 44 / 16
    assert planned.fits
    assert planned.gpu_memory_bytes is None


def test_fewer_zeros_than_a_run_has_left_are_warned_of(tiny_llama_folder: Path, tmp_path: Path) -> None:
    text, out = str(tiny_llama_folder / "calibration.txt"), tmp_path / "out"
    zeros = besa.compress(tiny_llama_folder, "magnitude", text, sparsity=0.5, out=out, samples=1, seqlen=8).record.zeros
    (warning,) = besa.plan(out, "magnitude", sparsity=0.4, calibration=text).warnings
    assert f"{zeros:,} zeros already, so `besa prune` refuses the" in warning
    with pytest.raises(BesaError, match="zeros already"):
        besa.compress(out, "magnitude", text, sparsity=0.4, samples=1, seqlen=8)
    again = float(warning.removesuffix(".").rpartition(" ")[2])
    assert besa.plan(out, "magnitude", sparsity=again, calibration=text).warnings == []


@pytest.mark.parametrize(
    ("config", "weights", "gigabytes"),
    [
        (LLAMA_70B, 80 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192), 80),
        (FALCON_180B, 80 * (14848 * (14848 + 2 * 8 * 64) + 14848**2 + 8 * 14848**2), 80),
    ],
    ids=["LLaMA-2-70B", "Falcon-180B"],
)
def test_the_largest_models_of_the_paper_fit_one_gpu_of_80_gb(config, weights, gigabytes, tmp_path) -> None:
    config.save_pretrained(tmp_path)
    planned = besa.plan(tmp_path, "besa", device="cuda")
    assert planned.prunable_weights == weights
    assert planned.zeros == weights // 2
    block = 2 * weights / 80
    assert 3 * block < planned.gpu_memory_bytes < gigabytes * 1e9  # weights, masked weights, importance, ranks
    assert planned.checkpoint_bytes > 2 * weights
    assert not planned.fits
    assert planned.lacking


@pytest.fixture
def nothing_taken(monkeypatch: Any) -> None:
    """This process counts as empty: what the system counts as its memory varies with the memory of others."""
    monkeypatch.setattr(memory, "current_bytes", lambda: 0)


def test_activations_beyond_the_budget_go_to_disk(tmp_path: Path, nothing_taken: None) -> None:
    LLAMA_70B.save_pretrained(tmp_path)
    near, far = (besa.plan(tmp_path, activation_budget=size) for size in (10**15, 1))
    assert near.activation_bytes == far.activation_bytes == 1.5 * 128 * 2048 * 8192 * 2
    assert near.activation_places == {"device": 0, "host": near.activation_bytes, "file": 0}
    assert far.activation_places == {"device": 0, "host": 0, "file": far.activation_bytes}
    assert near.memory_bytes - far.memory_bytes == near.activation_bytes
    assert far.disk_bytes - near.disk_bytes == near.activation_bytes


def test_hidden_states_are_planned_where_they_will_be(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """As many on the device as have room there, then on the host, then on the disk."""
    pruned, dense = 64 * 64 * 96 * 4, 64 * 32 * 96 * 4
    for budget, expected in {
        pruned + dense: (pruned + dense, 0, 0),
        pruned + dense - 1: (pruned, dense, 0),
        pruned - 1: (dense, 0, pruned),
        dense - 1: (0, 0, pruned + dense),
    }.items():
        sizes = {"samples": 64, "seqlen": 64, "device": "pretend", "activation_budget": budget}
        plan = besa.plan(tiny_llama_folder, "besa", out=tmp_path / "out", **sizes)
        assert plan.activation_places == dict(zip(("device", "host", "file"), expected, strict=True))
        assert plan.activation_bytes == pruned + dense
        rest = plan.gpu_memory_bytes - expected[0]
        without = besa.plan(tiny_llama_folder, "besa", out=tmp_path / "out", **sizes | {"activation_budget": 0})
        assert rest == without.gpu_memory_bytes
    monkeypatch.setattr(pretend.memory, "free", 4 * (pruned + dense) + 3)  # a quarter of it
    plan = besa.plan(tiny_llama_folder, "besa", out=tmp_path / "out", samples=64, seqlen=64, device="pretend")
    assert plan.activation_places == {"device": pruned + dense, "host": 0, "file": 0}
    assert plan.fits
    monkeypatch.setattr(pretend.memory, "total", plan.gpu_memory_bytes - 1)
    plan = besa.plan(tiny_llama_folder, "besa", out=tmp_path / "out", samples=64, seqlen=64, device="pretend")
    assert plan.lacking == [f"GPU memory ({pretend.memory.total / 1e9:.1f} GB)"]


def test_memory_that_cpu_and_gpu_share_is_planned_once(
    tiny_llama_folder: Path, tmp_path: Path, nothing_taken: None
) -> None:
    sizes = {"samples": 64, "seqlen": 64, "out": tmp_path / "out", "batch": 4, "activation_budget": 1 << 30}
    cpu, mps = (besa.plan(tiny_llama_folder, "besa", device=device, **sizes) for device in ("cpu", "mps"))
    assert mps.gpu_memory_bytes is None
    assert mps.activation_places == {"device": cpu.activation_bytes, "host": 0, "file": 0}
    assert mps.memory_bytes == cpu.memory_bytes


def test_a_gpu_that_is_not_here_is_planned_without_a_limit(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    LLAMA_70B.save_pretrained(tmp_path)
    plan = besa.plan(tmp_path, device="cuda:3")
    assert plan.activation_places == {"device": 1.5 * 128 * 2048 * 8192 * 2, "host": 0, "file": 0}
    assert "GPU memory (there is none)" in plan.lacking


@pytest.mark.parametrize(
    ("recipe", "passes", "streams"),
    [
        ("wanda", 2.03125, 1.03125),
        ("sparsegpt", 2.03125, 1.03125),
        ("besa", 0.5 + 2 + 3 * 0.5 * 88 / 64, 1.5),
        ("fast", 2.03125 + 3 / 8, 9 / 8),  # the inputs of eight blocks and the last outputs, an eighth of each
        (
            "best",  # four epochs of 56 sequences each, and eight held out, through the dense model and to learn from
            2.03125 + 3 / 8 + 29 / 8 + 4 * ((4 + 3 * HEAD) * 7 / 8 + (1 + 2 * HEAD) / 8) + (1 + 2 * HEAD) / 8,
            2 * 29 / 8,
        ),
    ],
)
def test_recipes_differ_in_what_they_take(recipe, passes, streams, tiny_llama_folder) -> None:
    planned = besa.plan(tiny_llama_folder, recipe, samples=64, seqlen=64)
    assert planned.forward_passes == passes
    assert planned.activation_bytes == streams * 64 * 64 * 96 * 4


@pytest.mark.parametrize(("strengths", "streams"), [([0, 1], 9 / 8), ([place / 14 for place in range(14)], 16 / 8)])
def test_trials_are_planned_beside_each_other(strengths, streams, tiny_llama_folder) -> None:
    recipe = Recipe.load("wanda", None, ["targets.method=search", f"targets.strengths={strengths}"])
    planned = besa.plan(tiny_llama_folder, recipe, samples=64, seqlen=64)
    assert planned.forward_passes == 2.03125 + (3 + 1 + len(strengths)) / 8
    assert planned.activation_bytes == streams * 64 * 64 * 96 * 4


def test_experts_are_planned_without_values(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        dtype="float32",
    )
    config.save_pretrained(tmp_path)
    planned = besa.plan(tmp_path, "besa", samples=4, seqlen=32)
    assert planned.prunable_weights == 2 * (2 * 64 * 64 + 2 * 64 * 8 * 16 + 8 * 3 * 64 * 96)


def test_what_stays_dense_is_told_by_plan_record_terminal_and_report(tiny_tokenizer: Any, tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "dense")
    recipe = Recipe.load("wanda").model_copy(update={"skip": ("*.k_proj",)})
    tokens = Calibration(torch.arange(64).reshape(4, 16), "text", 0)
    planned = besa.plan(tmp_path / "dense", recipe, samples=4, seqlen=16)
    record = besa.compress(tmp_path / "dense", recipe, tokens, out=tmp_path / "out", tokenizer=tiny_tokenizer).record
    assert planned.dense == record.dense == {"mlp.gate": 2 * 4 * 32, "self_attn.k_proj": 2 * 16 * 32}
    assert planned.model_sparsity == record.model_sparsity == record.zeros / record.model["parameters"]
    share, dense = f"{record.model_sparsity:.2%}", "mlp.gate, self_attn.k_proj"
    for shown in (show.planned(planned), show.pruned(record, tmp_path)):
        console = Console(record=True, width=200, file=io.StringIO())
        console.print(shown)
        text = console.export_text()
        assert share in text
        assert f"1,280 weights of the blocks stay dense: {dense}" in text
    page = render([load_run(tmp_path / "out")])
    assert dense in page
    assert share.replace("%", "\N{NO-BREAK SPACE}%") in page
    old = record.model_dump(exclude={"dense", "model_sparsity"})  # of an earlier besa
    assert RunRecord.model_validate(old).model_sparsity is None
    assert "stay dense" not in show.pruned(RunRecord.model_validate(old), tmp_path).plain


SHARED = {"samples": 11, "seqlen": 32, "batch": 2, "ranks": 3}  # 4, 4 and 3 sequences


def test_a_plan_of_three_ranks_by_hand(tiny_llama_folder: Path, tmp_path: Path) -> None:
    plan = besa.plan(tiny_llama_folder, "sparsegpt", out=tmp_path / "out", **SHARED)
    assert (plan.ranks, plan.sequences) == (3, 4)
    assert (
        plan.activation_bytes == (4 * 32 + 16) * 96 * 4
    )  # rank 0 has the first sequence of the dense path, half of it
    assert plan.forward_passes == 2 + 16 / (4 * 32)
    gathered = (2 * 32 + 2 * 16 + 2 * 86) * 96 + 32 * 256  # weights of a rank: a third of the rows of each matrix
    inputs = 3 * (96 + 2 * 96**2) + 256 + 2 * 256**2  # of q, k and v; of o; of gate and up; of down
    assert plan.traffic_bytes == {
        "statistics": round(4 / 3 * 8 * inputs),
        "rank": 2 * 2 * gathered,
        "rebuild": 2 * 2 * 4 * gathered,  # the columns of each turn, then the rebuilt rows
        "measure": round(4 / 3 * 8 * 2 * 96),
    }
    assert besa.plan(tiny_llama_folder, "sparsegpt", out=tmp_path / "out", **SHARED | {"ranks": 1}).traffic_bytes == {}


@pytest.mark.parametrize(
    ("recipe", "settings", "sent"),
    [
        ("besa", [], {"allocate": 44 * 4 * (1 + 896 * 101)}),  # at every step the loss, and 101 rates for each row
        ("besa", ["allocation.batch=2"], {"allocate": 44 * 8 * (1 + 896 * 101)}),  # sums of several are wider
        ("besa-layerwise", [], {"allocate": 88 * 4 * (1 + 896 * 101)}),
        ("fast", [], {"rebuild": 4 * 101_376 // 2}),
        ("best", TUNED, {"rebuild": 4 * 101_376 // 2, "finetune": 8 * 5 * (4 * 101_376 + 8 * 7)}),
        ("wanda", ["sparsity=0"], {}),
    ],
)
def test_methods_know_what_ranks_send(recipe, settings, sent, tiny_llama_folder: Path) -> None:
    """Of 2 ranks, each sends as many bytes as a sum has, and as many as the other's half of all rows has."""
    settings = [*settings, "allocation.steps=88"] if recipe == "besa-layerwise" else settings
    plan = besa.plan(tiny_llama_folder, Recipe.load(recipe, None, settings), samples=11, seqlen=32, batch=2, ranks=2)
    inputs = 8 * (3 * 96 + 256)
    common = {"statistics": inputs, "rank": 101_376, "measure": 8 * 2 * 96}
    if Recipe.load(recipe).needs_gram:
        common["statistics"] += 2 * 8 * (3 * 96**2 + 256**2)  # and of what is held out
    assert plan.traffic_bytes == common | sent


@pytest.mark.parametrize(
    ("recipe", "settings", "passes"),
    [
        ("wanda", [], 2 + 1 / 32),
        ("besa", ["allocation.batch=1"], 2.5 + 3 / 2 * 88 / 16),  # three ranks wait for the one that has the sequence
        ("besa", [], 2.5 + 3 / 2 * 88 / 16),
        ("besa", ["allocation.batch=8"], 3 + 3 * 44 * 2 / 16),
        ("best", [*TUNED, "finetune.batch=1"], 3 + 3 / 8 * 2 + 8 * (4 * 3 * 7 / 8 + 1 / 8) + 1 / 8),
        ("best", TUNED, 3 + 3 / 8 * 2 + 8 * (3 * 7 / 8 + 1 / 8) + 1 / 8),
    ],
)
def test_passes_of_a_rank_are_over_its_own_sequences(recipe, settings, passes, tiny_llama_folder: Path) -> None:
    """Eight sequences are measured, in two batches: the other two ranks wait."""
    sizes = {"samples": 64, "seqlen": 64, "batch": 4, "ranks": 4}
    plan = besa.plan(tiny_llama_folder, Recipe.load(recipe, None, settings), **sizes)
    assert plan.forward_passes == pytest.approx(passes)
    assert plan.sequences == 16


def test_all_ranks_must_fit_here(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: Any, nothing_taken: None
) -> None:
    sizes = SHARED | {"out": tmp_path / "out", "ranks": 2}
    needed = besa.plan(tiny_llama_folder, **sizes).memory_bytes
    monkeypatch.setattr(memory, "total_bytes", lambda: int(1.5 * needed))
    assert besa.plan(tiny_llama_folder, **sizes | {"ranks": 1}).fits
    plan = besa.plan(tiny_llama_folder, **sizes)
    assert plan.lacking == [f"memory ({1.5 * needed / 1e9:.1f} GB)"]
    assert not plan.fits
    monkeypatch.undo()
    assert besa.plan(tiny_llama_folder, device="pretend", **sizes | {"ranks": 1}).fits
    plan = besa.plan(tiny_llama_folder, device="pretend", **sizes)
    assert plan.lacking == ["GPU memory (one GPU for each of 2 ranks; there is 1)"]
    in_files = {"activation_budget": 0, "device": "cpu"}
    alone, together = (besa.plan(tiny_llama_folder, **sizes | in_files | {"ranks": ranks}) for ranks in (1, 2))
    files = [plan.activation_places["file"] for plan in (alone, together)]
    assert together.disk_bytes - alone.disk_bytes == 2 * files[1] - files[0]


def test_minutes_that_decide_in_a_terminal(tiny_llama_folder: Path) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    recipe = Recipe.load("best", None, ["distill.minutes=2.5"])
    console.print(show.planned(besa.plan(tiny_llama_folder, recipe, samples=8, seqlen=32)))
    assert "a backward pass counted as two; 2.5 minutes decide how many epochs there are" in console.export_text()


def test_one_of_each_is_told_as_one(tiny_llama_folder: Path) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    recipe = Recipe.load("best", None, ["distill.minutes=1"])
    console.print(show.planned(besa.plan(tiny_llama_folder, recipe, samples=2, seqlen=32, ranks=2)))
    text = console.export_text()
    assert "2, each with at most 1 calibration sequence " in text
    assert "1 minute decides how many epochs there are" in text
    assert "1 minute decides how many there are" in explain(recipe, samples=2, seqlen=32).text


def test_ranks_in_a_terminal(tiny_llama_folder: Path) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(show.planned(besa.plan(tiny_llama_folder, "sparsegpt", **SHARED)))
    text = console.export_text()
    assert "3, each with at most 4 calibration sequences" in text
    assert " 0.00 GB" not in text and " 0 MB" not in text  # a small model takes MB and kB
    assert re.search(r"disk +│ \d+ MB needed, 4 MB of it stays", text)
    assert "2.7 MB for a block: statistics 2, rank 0.14, rebuild 0.54, measure 0.002" in text


def test_inputs_that_matrices_share_are_found_by_their_shapes(tiny_llama_folder: Path, tmp_path: Path) -> None:
    def grouped(folder: Path) -> list[set[str]]:
        source = locate(str(folder))
        config = read_config(source)
        config.dtype = torch.float32
        model = skeleton(source, config)
        blocks = find_blocks(model)
        learn_arguments(model, blocks, {(1, 8)})
        unit = units(blocks, "block")[0]
        return [{name.rpartition("layers.0.")[2] for name in names} for names in shared_inputs(unit, model, 8)]

    attention = [{f"self_attn.{letter}_proj" for letter in "qkv"}, {"self_attn.o_proj"}]
    assert grouped(tiny_llama_folder) == [
        *attention, {"mlp.gate_proj", "mlp.up_proj"}, {"mlp.down_proj"}
    ]  # fmt: skip
    experts = MixtralConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        num_local_experts=4,
    )  # fmt: skip
    experts.save_pretrained(tmp_path)
    mixed = grouped(tmp_path)
    assert mixed[:2] == attention
    assert [len(names) for names in mixed[2:]] == [1] * 8  # gate and up are one matrix, down another


def test_gram_matrices_are_planned_as_wide_as_they_are_summed_up(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=4096, num_hidden_layers=1, num_attention_heads=4,
        dtype="float32",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    plain, gram = (
        besa.plan(tmp_path, Recipe.load("wanda", None, settings), samples=1, seqlen=2, device="cuda")
        for settings in ([], ["importance.method=obs"])
    )
    summed = 2 * 8 * (3 * 64**2 + 4096**2) + 4 * 4096**2  # and of what is held out
    assert gram.gpu_memory_bytes - plain.gpu_memory_bytes == pytest.approx(summed, rel=0.1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("loading", [False, True])
def test_a_gguf_file_is_planned_whole_in_memory(
    tmp_path: Path, shallow_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, device: str, loading: bool
) -> None:
    monkeypatch.setattr(memory, "current_bytes", lambda: 0)
    if loading:  # takes more than pruning
        monkeypatch.setattr(process, "TEXT", -1 << 40)
    file = tmp_path / "tiny.gguf"
    gguf_files.write(shallow_llama_folder, file, None)
    config = read_config(locate(shallow_llama_folder))
    sizes: dict[str, Any] = {"samples": 4, "seqlen": 64, "device": device}
    whole, on_disk = (besa.plan(model, "wanda", **sizes) for model in (file, shallow_llama_folder))
    for same in ("parameters", "zeros", "forward_passes", "checkpoint_bytes", "disk_bytes", "gpu_memory_bytes"):
        assert getattr(whole, same) == getattr(on_disk, same)
    weights = 4 * whole.parameters  # dequantised
    while_loading = file.stat().st_size + weights + 8 * config.vocab_size * config.hidden_size
    assert whole.memory_bytes == (while_loading if loading else on_disk.memory_bytes + weights)


def test_a_long_text_is_planned_as_it_is_tokenised(
    tmp_path: Path, shallow_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One document of plain text, and as many characters in many documents."""
    monkeypatch.setattr(memory, "current_bytes", lambda: 0)
    plain, lines = tmp_path / "long.txt", tmp_path / "long.jsonl"
    plain.write_text("né " * 1_000_000)
    lines.write_text("".join(json.dumps({"text": "né " * 1000}) + "\n" for _ in range(1000)))
    sizes: dict[str, Any] = {"samples": 4, "seqlen": 64, "device": "cpu"}
    usual = besa.plan(shallow_llama_folder, "wanda", **sizes).memory_bytes
    assert besa.plan(shallow_llama_folder, "wanda", calibration=str(lines), **sizes).memory_bytes == usual
    for calibration in (str(plain), f"c4:0.9,{plain}:0.1"):
        found = besa.plan(shallow_llama_folder, "wanda", calibration=calibration, **sizes).memory_bytes
        assert found == process.TEXT + process.TOKENIZED * 3_000_000
    assert usual < found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("missing.txt", "There is no text missing.txt"),
        ("c4:0.5,missing.txt:0.5", "There is no text missing.txt"),
        ("a" * 300, "Could not read a*"),
        ("", "The name of a text is empty"),
    ],
)
def test_a_text_that_is_not_there_is_refused_as_by_a_run(shallow_llama_folder: Path, text: str, words: str) -> None:
    with pytest.raises(besa.BesaError, match=words):
        besa.plan(shallow_llama_folder, "wanda", calibration=text)


def test_a_place_where_a_run_could_not_write_is_refused(tmp_path: Path, shallow_llama_folder: Path) -> None:
    model = shutil.copytree(shallow_llama_folder, tmp_path / "model")
    (tmp_path / "there").mkdir()
    with pytest.raises(besa.BesaError, match="there exists already: choose another name"):
        besa.plan(model, "wanda", out=tmp_path / "there")
    with pytest.raises(besa.BesaError, match="lies in the folder of the model"):
        besa.plan(model, "wanda", out=model / "out")


@pytest.mark.parametrize("out", ["file", "file/of/another"])
def test_a_place_that_is_no_folder_is_refused(tmp_path: Path, shallow_llama_folder: Path, out: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(besa.BesaError, match=f"{out} cannot be written: .*/file is no folder"):
        besa.plan(shallow_llama_folder, "wanda", out=tmp_path / out)


def test_live_bytes_are_counted_by_hand() -> None:
    live = _LiveBytes()
    x = torch.empty(10, 100, device="meta")
    linear = nn.Linear(100, 50, device="meta")
    with torch.no_grad(), live:
        y = linear(x)  # 2,000 bytes, kept
        z = y * 2 + 1  # two more, one of them gone when the other is there
        del y
        w = z.view(500) + 1  # a view is no new memory
    assert live.peak == 6000
    assert w.nbytes == 2000


def test_few_tokens_for_wide_inputs_are_warned_of(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """The widest inputs are the 256 of the down projections: 1,024 tokens are enough."""
    sizes = {"out": tmp_path / "out", "seqlen": 32}
    few = besa.plan(tiny_llama_folder, "sparsegpt", samples=31, **sizes)
    assert few.warnings == [
        "992 calibration tokens are few for inputs of 256 columns, and solving for weights may fit these tokens only: "
        "give at least 4 tokens for each column, such as --samples 32."
    ]
    assert few.fits
    assert besa.plan(tiny_llama_folder, "sparsegpt", samples=32, **sizes).warnings == []
    assert besa.plan(tiny_llama_folder, "wanda", samples=1, **sizes).warnings == []  # solves nothing
    skipping = besa.Recipe.load("sparsegpt").with_exceptions(["*.down_proj"], [])
    assert "inputs of 96 columns" in besa.plan(tiny_llama_folder, skipping, samples=11, **sizes).warnings[0]
    assert besa.plan(tiny_llama_folder, skipping, samples=12, **sizes).warnings == []


def test_a_run_says_too_that_its_tokens_are_few(tiny_llama_folder: Path) -> None:
    sizes = {"samples": 2, "seqlen": 16}
    expected = besa.plan(tiny_llama_folder, "sparsegpt", **sizes).warnings
    text = str(tiny_llama_folder / "calibration.txt")
    with pytest.warns(Notice, match=r"^32 calibration tokens are few for inputs of 256 columns") as heard:
        record = besa.compress(tiny_llama_folder, "sparsegpt", text, **sizes).record
    assert record.notes == expected == [str(one.message) for one in heard if one.category is Notice]
    assert besa.compress(tiny_llama_folder, "magnitude", text, **sizes).record.notes == []


def test_own_text_takes_passes_and_the_whole_model(tiny_llama_folder: Path, tmp_path: Path) -> None:
    sizes = {"out": tmp_path / "out", "samples": 8, "seqlen": 64}
    plain, own, half = (
        besa.plan(tiny_llama_folder, "wanda", calibration=text, **sizes) for text in ("mix", "self", "self:1,c4:1")
    )
    assert (plain.writing_passes, own.writing_passes, half.writing_passes) == (0, 1.25, 0.625)
    assert own.forward_passes == plain.forward_passes
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(show.planned(half))
    console.print(show.planned(besa.plan(tiny_llama_folder, "sparsegpt", **sizes)))
    text = console.export_text()
    assert text.count("as much as 0.625 passes, but token by token, by the whole model") == 1
    assert text.count("512 calibration tokens are few for inputs of 256 columns") == 1
    assert text.count(" MB needed, ") == 2
    on_gpu = besa.plan(tiny_llama_folder, "wanda", calibration="self", device="cuda", **sizes)
    cache = 2 * 8 * 2 * 24 * 4 * 64 * 32  # keys and values of 8 layers, 2 heads, 32 sequences of 64 tokens
    assert on_gpu.gpu_memory_bytes == 4 * on_gpu.parameters + cache
    with pytest.raises(besa.BesaError, match="gives c4,wiki no weight"):
        besa.plan(tiny_llama_folder, calibration="c4,wiki")


DISTILLED = ["distill={method: kl, learns: together}"]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (["sparsity=0.9"], 0.1),
        (["sparsity=0.9", "sparsity_of={'*': 0.0}"], 1.0),
        (["sparsity=0.0", "sparsity_of={'*': 0.9}"], 0.1),
        (["sparsity=0.0", "skip=['*.mlp.*']"], 27_648 / 101_376),
        (["allocation={method: depth, blocks: 6}"], 2 / 8),
    ],
)
def test_distilling_is_planned_with_the_weights_that_stay(
    tiny_llama_folder: Path, tmp_path: Path, settings: list[str], kept: float
) -> None:
    sizes = {"samples": 16, "seqlen": 32, "out": tmp_path / "out"}
    found, none = (
        besa.plan(
            tiny_llama_folder,
            Recipe.load("wanda", None, [*settings, f"distill={{method: kl, learns: {learns}}}"]),
            **sizes,
        )
        for learns in ("weights", "norms")
    )
    weights, vectors = 8 * 101_376, 17 * 96
    assert found.distilling_bytes - none.distilling_bytes == pytest.approx(16 * (kept * weights - vectors), rel=0.001)


def test_distilling_is_planned_with_the_whole_model(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Weights, and value, gradient and two moments of what learns; on the disk, two states and the distilled blocks."""
    sizes = {"samples": 16, "seqlen": 32, "out": tmp_path / "out"}
    linears, vectors, parameters = 8 * 101_376, 17 * 96, 8 * 101_376 + 17 * 96 + 1024 * 96
    plans = {
        learns: besa.plan(
            tiny_llama_folder, Recipe.load("wanda", None, [f"distill={{method: kl, learns: {learns}}}"]), **sizes
        )
        for learns in ("weights", "norms", "both", "together")
    }
    plain = besa.plan(tiny_llama_folder, "wanda", **sizes)
    assert plain.distilling_bytes == 0
    assert plain.parameters == parameters
    states, logits = 10 * 32 * 96 * 4, 5 * 4 * 1024 * 32
    block = plans["weights"].distilling_bytes - (4 * parameters + 16 * linears // 2 + states + logits)
    assert 0 < block < 4e6  # what a block keeps for its gradients, or its part of a state
    assert plans["norms"].distilling_bytes - block == 4 * parameters + 16 * vectors + states + logits
    assert plans["both"].distilling_bytes == plans["weights"].distilling_bytes
    assert plans["together"].distilling_bytes - plans["weights"].distilling_bytes == 16 * vectors
    state = (12 + 4) * (linears // 2 + vectors)
    assert plans["together"].disk_bytes == 4 * parameters + max(2 * state, 2 * 4 * parameters)
    assert plans["together"].disk_bytes > plain.disk_bytes
    assert plans["together"].activation_bytes == 2.03125 * 16 * 32 * 96 * 4  # all tokens of the dense model
    more = besa.plan(
        tiny_llama_folder, Recipe.load("wanda", None, ["distill={method: kl, epochs: 3, further: true}"]), **sizes
    )
    assert more.activation_bytes == 2 * (2 + 3 * 14) * 32 * 96 * 4  # inputs and targets of all epochs
    assert plans["norms"].memory_bytes >= plans["norms"].distilling_bytes
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(show.planned(plans["weights"]))
    assert "with the whole model at once" in console.export_text()


def test_a_device_by_a_number_that_is_not_here_is_planned_too(shallow_llama_folder: Path, tmp_path: Path) -> None:
    plan = besa.plan(shallow_llama_folder, "wanda", device="pretend:3", samples=4, seqlen=32, out=tmp_path / "out")
    assert plan.lacking == ["GPU memory (there is none)"]


@pytest.mark.parametrize(
    ("recipe", "dequantized"),
    [("wanda", False), *((recipe, each) for recipe in ("besa-int4", "best-int4") for each in (False, True))],
)
def test_a_run_asks_for_the_disk_that_is_planned(
    recipe: str, dequantized: bool, shallow_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def check_space(folder: Path, size: int) -> None:
        asked.append(size)
        raise BesaError("That is enough.")

    monkeypatch.setattr("besa.api.compressing.check_space", check_space)
    sizes = {"calibration": str(shallow_llama_folder / "calibration.txt"), "samples": 4, "seqlen": 32}
    with pytest.raises(BesaError, match="That is enough"):
        besa.compress(shallow_llama_folder, recipe, out=tmp_path / "out", dequantized=dequantized, **sizes)
    plan = besa.plan(shallow_llama_folder, recipe, **sizes)
    if dequantized and recipe == "besa-int4":  # that of `best-int4` is full when a state of its distilling is written
        assert asked[0] > plan.disk_bytes
    else:
        assert asked == [plan.disk_bytes]


def test_a_model_too_large_to_be_distilled_is_refused_before_the_work(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: Any, nothing_taken: None
) -> None:
    recipe, text = Recipe.load("wanda", None, DISTILLED), str(tiny_llama_folder / "calibration.txt")
    needed = besa.plan(tiny_llama_folder, recipe, samples=2, seqlen=32).distilling_bytes
    monkeypatch.setattr(memory, "total_bytes", lambda: needed // 2)
    plan = besa.plan(tiny_llama_folder, recipe, samples=2, seqlen=32, out=tmp_path / "out", activation_budget=10**9)
    assert not plan.fits
    assert plan.lacking == [f"memory ({needed / 2e9:.1f} GB)"]
    with pytest.raises(besa.BesaError) as refusal:
        besa.compress(tiny_llama_folder, recipe, text, out=tmp_path / "out", samples=2, seqlen=32)
    assert str(refusal.value).startswith("Distilling has the whole model in memory and needs ")
    assert str(refusal.value).endswith("set distill.learns=norms, which needs less, or distill.method=none.")
    assert list(tmp_path.iterdir()) == []
