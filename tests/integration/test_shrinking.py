"""Shrunk checkpoints: smaller dense shapes, the same logits, refused in a sentence where that cannot be."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import besa
from besa import BesaError, Recipe, cli
from besa.checkpoint import shrinking
from besa.checkpoint.provenance import earlier, staying
from besa.data.calibration import Calibration
from besa.models.couplings import couplings
from besa.models.finding import find_blocks
from besa.models.streaming import DecoderInMemory
from besa.record import RECORD_NAME, RunRecord
from tests.integration.test_families import TOKENS, config_of, load, random_model, saved
from tests.slowly import some_slow
from tests.sweep import small_model

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
TEXT = str(TINY / "calibration.txt")
FEW = Calibration(torch.arange(48).reshape(2, 24) * 17 % 251 + 3, "random", 0)
TOKENS_NT = torch.arange(60).reshape(2, 30) * 17 % 1024


def logits(model: PreTrainedModel, tokens_NT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens_NT, use_cache=False).logits


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama without half of its heads and a part of its channels."""
    recipe = Recipe.load(
        "fast",
        0.4,
        [
            "allocation={method: structured, heads: 0.5}",
            "targets.method=uniform",
            "reconstruction.method=cg",
            "finetune.epochs=1",
            "finetune.method=adam",
        ],
    )
    out = tmp_path_factory.mktemp("shrinking") / "pruned"
    besa.compress(TINY, recipe, TEXT, out=out, samples=4, seqlen=32)
    return out


def unread(model: PreTrainedModel, kind: str, counts: list[int]) -> None:
    """Zero the columns that read so many structures of each block, every other one from the second on; nothing else."""
    for block, count in zip(find_blocks(model), counts, strict=True):
        ((name, size),) = next(found for found in couplings(block) if found.kind == kind).columns.items()
        for structure in range(1, 2 * count, 2):
            block.weight(name)[:, structure * size : (structure + 1) * size] = 0


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(BesaError) as caught:
        action()
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    return str(caught.value)


def test_the_tiny_llama_gets_smaller_and_says_the_same(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["besa", "shrink", str(pruned), str(tmp_path / "small")])
    cli.main()
    shown = capsys.readouterr().out
    assert "key-value heads from 2 to 1, feed-forward channels from 256 to 160 in each block" in shown
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (pruned, tmp_path / "small"))
    config = after.config
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (160, 2, 1)
    assert config.head_dim == 24
    for layer in after.model.layers:
        assert layer.mlp.gate_proj.weight.shape == layer.mlp.up_proj.weight.shape == (160, 96)
        assert layer.mlp.down_proj.weight.shape == (96, 160)
        assert layer.self_attn.q_proj.weight.shape == (48, 96)
        assert layer.self_attn.k_proj.weight.shape == layer.self_attn.v_proj.weight.shape == (24, 96)
        assert layer.self_attn.o_proj.weight.shape == (96, 48)
        assert all(bool((parameter != 0).all()) for parameter in layer.parameters())
    torch.testing.assert_close(logits(after, TOKENS_NT), logits(before, TOKENS_NT), rtol=1e-4, atol=1e-4)
    assert {path.name for path in (tmp_path / "small").iterdir()} == {path.name for path in pruned.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    kept = {"intermediate_size", "num_attention_heads", "num_key_value_heads"}
    old, new = (json.loads((path / "config.json").read_text()) for path in (pruned, tmp_path / "small"))
    assert {key for key in old | new if old.get(key) != new.get(key)} == {*kept, "besa"}
    assert new["besa"] == old["besa"] | {"shrunk": {"ffn": [256, 160], "heads": [2, 1]}}


def test_a_full_disk_is_seen_before_the_work(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(shrinking, "check_space", lambda out, size: asked.append(size))
    done = besa.shrink(pruned, tmp_path / "small")
    assert asked[0] == pytest.approx(2 * done.file_bytes, rel=0.001)  # once in parts, once joined
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    words = refusal(lambda: besa.shrink(pruned, tmp_path / "out", progress=lambda *each: pytest.fail("it began")))
    assert "MB but only 100.00 kB are free there: make room first" in words
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_model_that_is_pruned_again_says_what_it_was_made_by(pruned: Path, tmp_path: Path) -> None:
    besa.shrink(pruned, tmp_path / "small")
    besa.pack(tmp_path / "small", tmp_path / "packed", head="int8")
    besa.unpack(tmp_path / "packed", tmp_path / "unpacked")
    sizes: dict[str, Any] = {"samples": 4, "seqlen": 32}
    besa.compress(tmp_path / "unpacked", "wanda", TEXT, out=tmp_path / "again", seed=3, **sizes)
    besa.compress(tmp_path / "again", "magnitude", TEXT, out=tmp_path / "third", sparsity=0.6, **sizes)
    folders = pruned, tmp_path / "again", tmp_path / "third"
    first, again, third = (RunRecord.read(path / RECORD_NAME) for path in folders)
    shrunk = {"ffn": (256, 160), "heads": (2, 1)}
    (one,) = again.earlier
    assert (one.recipe, one.sparsity, one.seed, one.created) == ("fast", first.sparsity, 0, first.created)
    assert (one.calibration, one.shrunk) == ([TEXT], shrunk)
    assert third.earlier[:1] == [one] and not first.earlier
    assert (third.earlier[1].recipe, third.earlier[1].seed, third.earlier[1].shrunk) == ("wanda", 3, shrunk)
    entry = json.loads((tmp_path / "third" / "config.json").read_text())["besa"]
    assert (entry["head"], entry["shrunk"]) == ("int8", {"ffn": [256, 160], "heads": [2, 1]})
    assert (entry["recipe"], entry["sparsity"]) == ("magnitude", third.sparsity)
    card = (tmp_path / "third" / "README.md").read_text()
    assert "| pruned before | `fast`, " in card and "| pruned before | `wanda`, " in card
    assert "| head and embeddings | rounded to 8 bits" in card
    assert "before the removal" not in card
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked")
    record = besa.compress(loaded, "magnitude", TEXT, tokenizer=AutoTokenizer.from_pretrained(TINY), **sizes).record
    assert [(run.recipe, run.shrunk) for run in record.earlier] == [("fast", shrunk)]


def test_a_head_that_learned_is_no_longer_rounded() -> None:
    entry = {"recipe": "wanda", "head": "int8", "shrunk": {"ffn": [256, 160]}}
    dense = random_model(config_of("qwen2"))
    dense.config.besa = entry
    decoder = DecoderInMemory(dense)
    rest = {"model.norm.weight": torch.ones(2)}
    assert staying(decoder, rest) == {"head": "int8", "shrunk": {"ffn": [256, 160]}}
    assert staying(decoder, rest | {"lm_head.weight": torch.ones(2, 2)}) == {"shrunk": {"ffn": [256, 160]}}
    for foreign in ("x", {"recipe": 1}, {"shrunk": 3}):
        dense.config.besa = foreign
        assert earlier(decoder) == []


def test_records_count_what_whole_structures_come_to(pruned: Path) -> None:
    record = json.loads((pruned / "besa_run.json").read_text())
    assert record["zeros"] == 8 * (96 * (48 + 24 + 24 + 48) + 96 * 3 * 96)


@pytest.mark.parametrize(
    ("family", "kind", "structures", "dtype"),
    [
        ("qwen2", "heads", 2, torch.float32),
        ("qwen3", "ffn", 96, torch.bfloat16),
        ("gemma3", "heads", 2, torch.float32),
        ("phi", "heads", 4, torch.float32),
        ("starcoder2", "ffn", 96, torch.float32),
        ("opt", "ffn", 96, torch.float32),
        ("gpt2", "ffn", 256, torch.float32),
        ("falcon", "ffn", 256, torch.bfloat16),
    ],
)
def test_families_lose_what_nothing_reads_whatever_its_rows_and_biases_are(
    family: str, kind: str, structures: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The blocks have different numbers of unread structures: as many go as every block has."""
    dense = random_model(config_of(family)).to(dtype)
    unread(dense, kind, [1, 2] if kind == "heads" and structures > 2 else [1, 1] if kind == "heads" else [30, 20])
    found = besa.shrink(saved(dense, tmp_path / "dense"), tmp_path / "small")
    lost = 1 if kind == "heads" else 20
    assert found.structures == {kind: (structures, structures - lost)}
    assert found.file_bytes < found.file_bytes_before
    small = load(tmp_path / "small")
    assert small.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    expected, logits_ = logits(dense, TOKENS.tokens_NT), logits(small, TOKENS.tokens_NT)
    torch.testing.assert_close(logits_, expected, rtol=tolerance, atol=tolerance)


def test_numbers_of_the_files_keep_their_bits_whatever_config_json_says(tmp_path: Path) -> None:
    dense = random_model(config_of("llama"))
    unread(dense, "ffn", [8, 8])
    saved(dense, tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    shutil.copy(tmp_path / "dense" / "model.safetensors", tmp_path / "dense" / "consolidated.safetensors")
    done = besa.shrink(tmp_path / "dense", tmp_path / "small")
    assert done.file_bytes_before == (tmp_path / "dense" / "model.safetensors").stat().st_size  # which alone is read
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "small"))
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in after.items():
        of_before = before[name]
        if tensor.shape != of_before.shape:
            axis = 1 if "down_proj" in name else 0
            of_before = of_before.index_select(axis, torch.tensor([i for i in range(96) if i % 2 == 0 or i > 15]))
        assert tensor.dtype == torch.float32 and torch.equal(tensor, of_before), name


def test_files_without_a_floating_point_number_are_refused(tmp_path: Path) -> None:
    folder = saved(random_model(config_of("llama")), tmp_path / "dense")
    integers = {name: tensor.int() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(integers, folder / "model.safetensors", metadata={"format": "pt"})
    assert "I32" in refusal(lambda: besa.shrink(folder, tmp_path / "small"))


def test_heads_under_a_common_norm_are_not_pruned(tiny_tokenizer: Any, tmp_path: Path) -> None:
    folder = saved(random_model(config_of("olmo2")), tmp_path / "dense")
    recipe = Recipe(sparsity=0.3, allocation={"method": "structured", "heads": 0.5})
    words = refusal(lambda: besa.compress(folder, recipe, TOKENS, out=tmp_path / "out", tokenizer=tiny_tokenizer))
    assert "The key-value heads of model.layers.0 depend on each other" in words


@pytest.mark.parametrize(
    ("family", "kind", "words"),
    [
        ("olmo2", "heads", "configuration cannot describe fewer key-value heads"),
        ("opt", "heads", "configuration cannot describe fewer key-value heads"),
        ("bloom", "ffn", "configuration cannot describe fewer feed-forward channels"),
        ("phi3", "", "no feed-forward channels or heads that besa can separate"),
        ("mixtral", "", "no feed-forward channels or heads that besa can separate"),
        ("deepseek_v3", "", "blocks of this model have different shapes"),
        ("llama", "", "blocks without unread key-value heads or feed-forward channels"),
    ],
)
def test_what_cannot_be_shrunk(family: str, kind: str, words: str, tmp_path: Path) -> None:
    dense = random_model(config_of(family))
    if kind:
        unread(dense, kind, [1, 1])
    saved(dense, tmp_path / "dense")
    assert words in refusal(lambda: besa.shrink(tmp_path / "dense", tmp_path / "small"))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("family", "layers"),
    some_slow(
        [("doge", "attention"), ("xglm", "attention"), ("diffllama", "attention"), ("bitnet", "mlp")],
        {("doge", "attention"), ("bitnet", "mlp")},
    ),
)
def test_models_whose_own_code_fails_with_fewer_heads_or_channels(
    family: str, layers: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    dense, out = saved(small_model(family), tmp_path / "dense"), tmp_path / "out"
    recipe = Recipe.load("depth", overrides=["allocation.blocks=1", f"allocation.layers={layers}"])
    besa.compress(dense, recipe, FEW, out=out, tokenizer=tiny_tokenizer)
    words = refusal(lambda: besa.shrink(out, tmp_path / "small", by_block=True))
    assert words.endswith(
        "computes something else with smaller matrices: the zeros of this model cannot be removed from it."
    )
    assert not (tmp_path / "small").exists()


def test_a_model_without_attention_is_not_written(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = small_model("qwen3_5_text")
    dense, out = saved(model, tmp_path / "dense"), tmp_path / "out"
    attention = model.config.layer_types.index("full_attention")
    skip = [f"*.layers.{index}.mlp.down_proj" for index in range(len(model.config.layer_types)) if index != attention]
    recipe = Recipe.load("depth", overrides=["allocation.blocks=1", f"skip={skip}"])
    besa.compress(dense, recipe, FEW, out=out, tokenizer=tiny_tokenizer)
    words = refusal(lambda: besa.shrink(out, tmp_path / "small"))
    assert words.startswith("No attention would stay, and transformers runs no such model")
    assert not (tmp_path / "small").exists()


def test_a_wrong_cut_is_seen_before_the_folder_appears(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shrinking, "_without_first", lambda unread_S, number: torch.arange(len(unread_S) - number))
    assert "computes something else" in refusal(lambda: besa.shrink(pruned, tmp_path / "small"))
    assert not list(tmp_path.iterdir())


def test_packed_models_and_folders_that_are_there_are_refused(pruned: Path, tmp_path: Path) -> None:
    besa.pack(pruned, tmp_path / "packed")
    assert "besa unpack" in refusal(lambda: besa.shrink(tmp_path / "packed", tmp_path / "small"))
    assert "exists already" in refusal(lambda: besa.shrink(pruned, tmp_path / "packed"))
