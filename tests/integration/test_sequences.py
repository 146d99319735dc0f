"""Sequences as models can take them: positions, known tokens and the first token, from the text to the record."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaConfig, GPT2Config

import besa
from besa.cli import app
from besa.data import questions as embedded
from besa.data.calibration import Calibration, sample
from besa.errors import BesaError, Notice
from besa.models.limits import usual_length
from besa.models.source import locate
from besa.system import memory
from tests.tiny_questions import ask
from tests.tiny_questions import write as write_questions

TINY = Path(__file__).parent.parent / "assets" / "tiny-llama"
TEXT, HELDOUT = str(TINY / "calibration.txt"), str(TINY / "heldout.txt")
SMALL = {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 0}


def saved(config, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    config = GPT2Config(**SMALL, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    return saved(config, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    """Small and random, with a tokenizer that puts its BOS token before a text."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GemmaConfig(**SMALL, **sizes, num_key_value_heads=2, head_dim=16, initializer_range=0.3)
    folder = saved(config, tmp_path_factory.mktemp("gemma"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def more_tokens(tmp_path_factory) -> Path:
    """The tiny Llama with a token that was added to its tokenizer alone."""
    folder = Path(shutil.copytree(TINY, tmp_path_factory.mktemp("more") / "llama"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(folder)
    return folder


# --- positions ---


def test_by_default_sequences_are_as_long_as_learned_positions_allow(gpt2, monkeypatch):
    record = besa.compress(gpt2, "wanda", TEXT, samples=4).record
    assert record.calibration["seqlen"] == 32
    assert record.notes == []
    assert besa.evaluate(gpt2, [HELDOUT], max_windows=2).window == 32
    monkeypatch.setattr(memory, "current_bytes", lambda: 0)  # the process grows between two plans
    assert besa.plan(gpt2, "wanda", samples=4) == besa.plan(gpt2, "wanda", samples=4, seqlen=32)
    assert (usual_length(locate(gpt2)), usual_length(locate(TINY))) == (32, 512)


def test_more_than_learned_positions_is_refused(gpt2, tmp_path):
    calls = {
        "--seqlen": [
            lambda: besa.compress(gpt2, "wanda", TEXT, out=tmp_path / "o", samples=4, seqlen=33),
            lambda: besa.plan(gpt2, "wanda", samples=4, seqlen=33),
        ],
        "--window": [lambda: besa.evaluate(gpt2, [HELDOUT], window=[16, 33])],
        "A calibration sequence of": [
            lambda: besa.compress(gpt2, "wanda", Calibration(torch.zeros(2, 33, dtype=torch.int64), "mine", 0))
        ],
    }
    for option, refused in calls.items():
        for call in refused:
            with pytest.raises(BesaError) as caught:
                call()
            assert str(caught.value) == f"{option} 33: the model has 32 positions, so give at most 32."
    assert list(tmp_path.iterdir()) == []


def test_more_than_rotary_positions_is_told_and_recorded(tmp_path):
    folder = Path(shutil.copytree(TINY, tmp_path / "llama"))
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 32}
    (folder / "config.json").write_text(json.dumps(config))
    told = "{} 64 is beyond the 32 positions that the model was trained for."
    with pytest.warns(Notice, match=told.format("--seqlen")) as heard:
        record = besa.compress(folder, "wanda", TEXT, samples=4, seqlen=64).record
    assert record.notes == [told.format("--seqlen")]
    assert len([one for one in heard if one.category is Notice]) == 1
    with pytest.warns(Notice, match=told.format("--window")):
        found = besa.evaluate(folder, [HELDOUT], window=64, max_windows=2)
    assert found.notes == [told.format("--window")]
    assert besa.compress(folder, "wanda", TEXT, samples=4).record.calibration["seqlen"] == 32


def test_questions_longer_than_the_positions_lose_their_beginning(gpt2, tiny_tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(
        embedded, "fetch", lambda name, progress: write_questions(name.removeprefix("zero-shot-"), tmp_path)
    )
    model = AutoModelForCausalLM.from_pretrained(gpt2).eval()
    seen = []
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True)
    assert ask(model, tiny_tokenizer, ["boolq"]).tasks["boolq"].questions == 6
    assert max(seen) == 32


# --- tokens that the model does not know ---


def test_a_token_without_a_row_is_named_before_the_work(more_tokens, tmp_path):
    text = tmp_path / "chat.txt"
    text.write_text("<|im_start|>" + Path(TEXT).read_text(encoding="utf-8"), encoding="utf-8")
    sentence = "'<|im_start|>' with the id 1,024, but the model's embeddings have 1,024 rows only"
    for seed in range(3):  # whether it is drawn or not
        with pytest.raises(BesaError, match=r"rows only") as caught:
            besa.compress(more_tokens, "wanda", str(text), samples=2, seqlen=16, seed=seed)
        assert sentence in str(caught.value)
    told = []
    with pytest.raises(BesaError, match=r"rows only"):
        besa.evaluate(more_tokens, [HELDOUT, str(text)], window=16, progress=lambda *news: told.append(news))
    assert not any("perplexity" in note for _, _, note in told)
    with pytest.raises(BesaError, match=r"rows only"):
        besa.compress(more_tokens, "wanda", Calibration(torch.full((2, 16), 1024), "mine", 0))
    assert besa.compress(more_tokens, "wanda", TEXT, samples=2, seqlen=16).record.zeros > 0


def test_a_question_with_a_token_without_a_row(tiny_llama, more_tokens, monkeypatch, tmp_path):
    monkeypatch.setattr(
        embedded, "fetch", lambda name, progress: write_questions(name.removeprefix("zero-shot-"), tmp_path)
    )
    tokenizer = AutoTokenizer.from_pretrained(more_tokens)
    assert ask(tiny_llama, tokenizer, ["piqa"], limit=1).tasks
    tokenizer.add_tokens(["river"])
    with pytest.raises(BesaError, match=r"'river' with the id 1,025"):
        ask(tiny_llama, tokenizer, ["piqa"])


# --- the first token ---


def by_hand(folder: Path, window: int, windows: int, first: list[int]) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = Path(HELDOUT).read_text(encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, verbose=False)["input_ids"]
    own, losses = window - len(first), []
    for start in range(0, windows * own, own):
        ids = torch.tensor(first + tokens[start : start + own])
        with torch.no_grad():
            logits_TV = model(input_ids=ids[None]).logits[0].double().log_softmax(dim=1)
        losses += [-float(logits_TV[place, token]) for place, token in enumerate(ids[1:])]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(("bos", "first"), [("auto", [0]), ("yes", [0]), ("no", [])])
def test_windows_of_a_gemma_begin_with_its_bos_token(gemma, bos, first):
    found = besa.evaluate(gemma, [HELDOUT], window=16, max_windows=5, bos=bos)
    assert found.perplexity["heldout"] == pytest.approx(by_hand(gemma, 16, 5, first), rel=1e-4)
    assert found.details["heldout"].bos == bool(first)
    assert found.details["heldout"].predicted == 5 * 15
    assert found.bos == bos
    assert by_hand(gemma, 16, 5, [0]) != pytest.approx(by_hand(gemma, 16, 5, []), rel=1e-2)


def test_calibration_sequences_of_a_gemma_begin_with_its_bos_token(gemma):
    tokenizer = AutoTokenizer.from_pretrained(gemma)
    record = besa.compress(gemma, "wanda", TEXT, samples=4, seqlen=16).record
    assert record.calibration == sample(TEXT, tokenizer, 4, 16, 0, bos=0).describe()
    assert record.calibration["bos"]
    assert record.calibration["beginning"] == Path(TEXT).read_text(encoding="utf-8")[:80]
    plain = besa.compress(gemma, "wanda", TEXT, samples=4, seqlen=16, bos="no").record
    assert plain.calibration == sample(TEXT, tokenizer, 4, 16, 0).describe()


def test_published_figures_of_llama_have_no_bos_token(gemma):
    tokenizer = AutoTokenizer.from_pretrained(gemma)
    model = AutoModelForCausalLM.from_pretrained(TINY)
    found = {
        bos: besa.evaluate(model, [HELDOUT], tokenizer=tokenizer, window=16, max_windows=3, bos=bos)
        for bos in ("auto", "no", "yes")
    }
    assert found["auto"].perplexity == found["no"].perplexity != found["yes"].perplexity


def test_tasks_begin_as_lm_eval_has_it_unless_asked_otherwise(gemma, tiny_tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(
        embedded, "fetch", lambda name, progress: write_questions(name.removeprefix("zero-shot-"), tmp_path)
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(gemma).eval(), AutoTokenizer.from_pretrained(gemma)
    first = []
    model.register_forward_pre_hook(lambda _, __, given: first.append(given["input_ids"][:, 0]), with_kwargs=True)
    for bos, begins in (("auto", True), ("yes", True), ("no", False)):
        first.clear()
        assert ask(model, tokenizer, ["piqa"], limit=2, bos=bos).bos == begins
        assert bool((torch.cat(first) == 0).all()) == begins
    assert not ask(model, tiny_tokenizer, ["piqa"], limit=1).bos
    with pytest.raises(BesaError, match=r"^--bos yes: the tokenizer puts no token before a text"):
        ask(model, tiny_tokenizer, ["piqa"], limit=1, bos="yes")


def test_the_command_line_hands_them_on(gemma, gpt2, tmp_path, capsys):
    def run(*arguments):
        app([str(argument) for argument in arguments], standalone_mode=False)

    run(
        "prune",
        gemma,
        tmp_path / "o",
        "--recipe=wanda",
        "--calibration",
        TEXT,
        "--samples=2",
        "--seqlen=16",
        "--bos=no",
    )
    assert json.loads((tmp_path / "o" / "besa_run.json").read_text())["calibration"]["bos"] is False
    run("eval", tmp_path / "o", "--ppl", HELDOUT, "--window=16", "--max-windows=2", "--json", tmp_path / "e.json")
    found = json.loads((tmp_path / "e.json").read_text())
    assert (found["details"]["heldout"]["bos"], found["bos"]) == (True, "auto")
    assert found["beginnings"] == {"heldout": Path(HELDOUT).read_text(encoding="utf-8")[:80]}
    options = ["--calibration", TEXT, "--samples=2", "--ppl", HELDOUT, "--max-windows=2"]
    run("compare", gpt2, "--recipes=wanda", *options, "--out", tmp_path / "c")
    assert json.loads((tmp_path / "c" / "compare.json").read_text())["window"] == 32
    run("compare", gpt2, "--recipes=wanda", *options, "--bos=yes", "--out", tmp_path / "d")
    (record,) = (tmp_path / "d").glob("wanda*.run.json")
    assert json.loads(record.read_text())["calibration"]["bos"] is True
    run("plan", gpt2, "--recipe=best", "--passes=200", "--samples=64")
