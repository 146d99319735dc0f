"""Calibration on what the dense model writes itself, and on dialogues: text, cache, resuming, ranks, errors."""

import io
import json
import shutil
import weakref
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import besa
from besa import cli
from besa.api import Compressed
from besa.counting.precision import widest
from besa.data import dialogues, documents
from besa.data.embedded import EMBEDDED
from besa.errors import BesaError, Interrupted
from besa.models.loading import load_model
from besa.models.source import locate
from besa.models.streaming import DecoderInMemory, DecoderOnDisk
from besa.runtime import own_text
from besa.runtime.own_text import Author
from besa.studies.workspace import Conditions, Measures, Workspace
from besa.system import devices, ranks
from tests import pretend
from tests.ranks import started

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
CPU = torch.device("cpu")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SAMPLES, SEQLEN = 8, 32
MADE = 10  # of which a fifth is dropped


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, beside the kernels that are compiled already."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(own_text, "cache_dir", lambda: folder)
    return folder


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedded texts of our own making."""
    text = (TINY / "calibration.txt").read_text(encoding="utf-8")

    def pieces(name: str, progress: object) -> list[str]:
        start = 6000 * list(EMBEDDED).index(name)
        return [text[start + 600 * i : start + 600 * (i + 1)] for i in range(10)]

    def read(name: str, progress: object) -> list[str]:
        return pieces(name, progress) if name in EMBEDDED else original(name, progress)

    original = documents._documents
    monkeypatch.setattr(documents, "_documents", read)


def with_tokenizer(folder: Path, change: Callable[[Any], None]) -> Path:
    """A copy of the tiny Llama with another tokenizer."""
    shutil.copytree(TINY, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer puts a BOS token before a text."""

    def change(tokenizer: Any) -> None:
        adding = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        tokenizer.backend_tokenizer.post_processor = adding

    return with_tokenizer(tmp_path_factory.mktemp("beginning") / "model", change)


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template; the newline ends its answers."""

    def change(tokenizer: Any) -> None:
        tokenizer.chat_template = TEMPLATE

    folder = with_tokenizer(tmp_path_factory.mktemp("instruct") / "model", change)
    settings = json.loads((folder / "generation_config.json").read_text())
    settings["eos_token_id"] = [newline(folder)]
    settings["repetition_penalty"] = 9.0  # of no account here
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def newline(folder: Path) -> int:
    (token,) = AutoTokenizer.from_pretrained(folder)("\n", add_special_tokens=False)["input_ids"]
    return int(token)


def author(folder: Path, **changes: Any) -> Author:
    source = locate(folder)
    settings: dict[str, Any] = {
        "decoder": DecoderOnDisk(source),
        "opened": source,
        "tokenizer": AutoTokenizer.from_pretrained(folder),
        "identity": {"fingerprint": "of the tiny Llama", "dtype": "float32"},
        "seqlen": SEQLEN,
        "seed": 0,
        "bos": None,
        "chat": False,
        "device": CPU,
        "dtype": "auto",
        "progress": lambda *_: None,
    }
    return Author(**settings | changes)


def prune(model: Path, calibration: str, out: Path, **changes: Any) -> Compressed:
    settings = {"recipe": "wanda", "samples": SAMPLES, "seqlen": SEQLEN, "device": "cpu"} | changes
    return besa.compress(model, settings.pop("recipe"), calibration, out=out, **settings)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(BesaError) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


@torch.no_grad()
def reference(folder: Path, starts_NS: torch.Tensor, length: int, seed: int, hot: bool) -> tuple[Any, Any]:
    """Sequences of that length and their perplexities, token by token without a cache of keys and values."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator, tokens_NT = torch.Generator().manual_seed(seed), starts_NS
    for step in range(length - starts_NS.shape[1]):
        logits_NV = model(tokens_NT).logits[:, -1].double()
        temperature = 2 - step / 10 if hot and step < 10 else 1
        probabilities_NV = (logits_NV / temperature).softmax(-1)
        random_N = torch.rand(len(tokens_NT), 1, generator=generator, dtype=torch.float64)
        chosen_N = (probabilities_NV.cumsum(-1) <= random_N).sum(-1)
        tokens_NT = torch.cat([tokens_NT, chosen_N[:, None]], dim=1)
    logarithms_NTV = model(tokens_NT).logits.double().log_softmax(-1)[:, starts_NS.shape[1] - 1 : -1]
    written_NT = tokens_NT[:, starts_NS.shape[1] :]
    return tokens_NT, -logarithms_NTV.gather(2, written_NT[..., None])[..., 0].mean(1)


def test_a_recipe_that_does_not_suit_the_model_is_refused_before_a_word_is_written(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_text, "load_model", lambda *_: pytest.fail("it writes"))
    recipe = besa.Recipe.load("wanda").with_exceptions(["*.kproj"], [])
    assert "The skip pattern *.kproj matches no prunable weight" in refused(
        lambda: prune(tiny_llama_folder, "self", tmp_path / "out", recipe=recipe)
    )


# --- what is written ---


def test_a_text_from_bos_is_sampled_as_the_model_says(beginning: Path) -> None:
    """Ten sequences of one token more, of which the eight likeliest stay, without BOS."""
    drawn_NT, losses_N = reference(beginning, torch.zeros(MADE, 1, dtype=torch.int64), SEQLEN + 1, 3, hot=True)
    kept = sorted(losses_N.argsort()[:SAMPLES].tolist())
    assert kept != list(range(SAMPLES))
    assert torch.equal(author(beginning, seed=3)(SAMPLES), drawn_NT[kept, 1:])
    with_bos_NT, losses_N = reference(beginning, torch.zeros(MADE, 1, dtype=torch.int64), SEQLEN, 3, hot=True)
    kept = sorted(losses_N.argsort()[:SAMPLES].tolist())
    assert torch.equal(author(beginning, seed=3, bos=0)(SAMPLES), with_bos_NT[kept])


def test_without_bos_a_text_goes_on_from_a_few_real_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    real = own_text.sample("mix", AutoTokenizer.from_pretrained(TINY), MADE, 8, 3).tokens_NT
    drawn_NT, losses_N = reference(TINY, real, SEQLEN, 3, hot=False)
    kept = sorted(losses_N.argsort()[:SAMPLES].tolist())
    assert torch.equal(author(TINY, seed=3)(SAMPLES), drawn_NT[kept])


def test_batches_go_on_one_after_another(beginning: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "LARGEST", 4)
    told = []
    found = author(beginning, progress=lambda *heard: told.append(heard))(SAMPLES)
    assert found.shape == (SAMPLES, SEQLEN)
    assert len(found.unique(dim=0)) == SAMPLES
    goal = SAMPLES * SEQLEN * 1.25
    steps = [done for done, total, note in told if note == "writing text of the model's own"]
    assert {total for _, total, _ in told} == {goal}
    assert steps == sorted(steps)
    assert len(steps) == 3 * SEQLEN  # batches of 4, 4 and 2
    assert steps[-1] == goal


@pytest.mark.slow
def test_a_device_without_float64_writes_the_same(beginning: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretend.numbers, "float64", False)
    widest.cache_clear()
    own = {"identity": {"fingerprint": None, "dtype": "float32"}, "seqlen": 16}
    found = author(beginning, device=torch.device("pretend:0"), **own)(2)
    widest.cache_clear()
    assert torch.equal(found, author(beginning, **own)(2))


def test_learned_positions_are_enough(beginning: Path) -> None:
    """The token before the text takes none of the last."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=1024, n_positions=SEQLEN, n_embd=16, n_layer=1, n_head=2, bos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    identity: dict[str, Any] = {"fingerprint": None, "dtype": "float32"}
    found = author(beginning, decoder=DecoderInMemory(model), opened=model, identity=identity)(3)
    assert found.shape == (3, SEQLEN)


def test_answers_end_and_are_joined_to_sequences(instruct: Path) -> None:
    """Questions are passages of real texts in the template; each answer goes on to a newline."""
    tokenizer, end = AutoTokenizer.from_pretrained(instruct), newline(instruct)
    found = author(instruct, chat=True, seqlen=96)(SAMPLES)
    assert found.shape == (SAMPLES, 96)
    asked = set(dialogues.questions(0))
    several = 0
    for text in tokenizer.batch_decode(found):
        turns = text.split("<user> ")
        assert turns[0] == ""
        for turn in turns[1:-1]:  # the last is cut
            question, _, answer = turn.partition("\n<assistant> ")
            assert question in asked
            assert answer.endswith("\n")
            assert answer.count("\n") == 1
            several += 1
    assert several > SAMPLES / 2
    assert (found == end).any()


# --- the cache ---


def test_what_was_written_is_read_again(beginning: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(*arguments: Any) -> Any:
        model = load_model(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(own_text, "load_model", load)
    found = author(beginning)(SAMPLES)
    assert [model() for model in loaded] == [None]  # freed
    assert len(list((cache / "own-text").iterdir())) == 1
    assert torch.equal(author(beginning)(SAMPLES), found)
    monkeypatch.setattr(own_text, "load_model", lambda *_: pytest.fail("it is written again"))
    assert torch.equal(author(beginning)(SAMPLES), found)
    for change in ({"seed": 1}, {"seqlen": 33}, {"bos": 0}, {"identity": {"fingerprint": "b", "dtype": "float32"}}):
        with pytest.raises(pytest.fail.Exception):
            author(beginning, **change)(SAMPLES)
    with pytest.raises(pytest.fail.Exception):
        author(beginning)(SAMPLES + 1)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_cache_is_written_again(beginning: Path, cache: Path, damage: str) -> None:
    found = author(beginning)(SAMPLES)
    (file,) = (cache / "own-text").iterdir()
    whole = file.read_bytes()
    flipped = whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]
    file.write_bytes({"cut": whole[:-9], "flipped": flipped, "empty": b""}[damage])
    assert torch.equal(author(beginning)(SAMPLES), found)
    with safe_open(file, "pt") as again:
        assert torch.equal(again.get_tensor("tokens"), found)


def test_a_loaded_model_writes_anew_and_stays_as_it_was(beginning: Path, cache: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(beginning).train()
    settings = model.generation_config
    tokenizer = AutoTokenizer.from_pretrained(beginning)
    record = besa.compress(
        model, "wanda", "self", samples=SAMPLES, seqlen=SEQLEN, tokenizer=tokenizer, device="cpu"
    ).record
    assert not cache.exists()
    assert model.training
    assert model.generation_config is settings
    by_name = prune(beginning, "self", cache.with_name("out")).record
    assert record.calibration["sha256"] == by_name.calibration["sha256"]


# --- in a run ---


def stopped_after(blocks: int) -> Callable[[float, float, str], None]:
    def progress(done: float, _: float, state: str = "") -> None:
        if done == blocks and not state.startswith(("embeddings", "writing")):
            raise KeyboardInterrupt

    return progress


def test_a_resumed_run_is_bit_equal_and_writes_nothing_again(
    beginning: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = "self:0.5,mix:0.5"
    whole = prune(beginning, calibration, tmp_path / "whole").record
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        prune(beginning, calibration, tmp_path / "out", progress=stopped_after(5))
    monkeypatch.setattr(own_text, "load_model", lambda *_: pytest.fail("it is written again"))
    resumed = prune(beginning, calibration, tmp_path / "out", resume=True).record
    assert resumed.restored_blocks >= 5
    assert resumed.calibration == whole.calibration
    names = ["model.safetensors", "config.json", "tokenizer.json"]
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == [
        (tmp_path / "whole" / name).read_bytes() for name in names
    ]


@pytest.mark.slow
def test_a_run_is_not_resumed_on_other_text(beginning: Path, instruct: Path, tmp_path: Path) -> None:
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        prune(beginning, "self", tmp_path / "out", progress=stopped_after(5))
    said = refused(lambda: prune(beginning, "self:0.5,c4:0.5", tmp_path / "out", resume=True))
    assert "belongs to a run with calibration.source = 'self'" in said
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        prune(instruct, "wiki", tmp_path / "chat", chat=True, progress=stopped_after(5))
    assert "calibration." in refused(lambda: prune(instruct, "wiki", tmp_path / "chat", resume=True))


def test_the_record_says_what_each_text_gave(beginning: Path, tmp_path: Path) -> None:
    record = prune(beginning, "self:0.5,mix:0.5", tmp_path / "out", samples=11).record
    parts = [(part["source"], part["share"], part["samples"]) for part in record.calibration["parts"]]
    assert parts == [("self", 0.5, 6), *((name, 0.1, 1) for name in EMBEDDED)]
    assert json.loads((tmp_path / "out" / "besa_run.json").read_text())["calibration"] == record.calibration
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "text that the dense model wrote, `c4`, `wiki`, `code`, `technical` and `multilingual`, 11 sequences" in card


def test_dialogues_of_a_text_in_the_template(instruct: Path, tmp_path: Path) -> None:
    text = str(TINY / "calibration.txt")
    plain, chat = (prune(instruct, text, tmp_path / name, chat=name == "chat").record for name in ("plain", "chat"))
    assert "chat" not in plain.calibration
    assert chat.calibration["chat"] is True
    assert chat.calibration["sha256"] != plain.calibration["sha256"]
    assert "as dialogues, 8 sequences" in (tmp_path / "chat" / "README.md").read_text(encoding="utf-8")


def test_other_ranks_get_the_text_of_the_first(beginning: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = author(beginning)(SAMPLES)

    def tensors_from_first(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert own["tokens"].numel() == 0
        return {"tokens": sent}

    monkeypatch.setattr(own_text, "load_model", lambda *_: pytest.fail("another rank writes"))
    monkeypatch.setattr(ranks, "tensors_from_first", tensors_from_first)
    with ranks.together(1, 2):
        assert torch.equal(author(beginning, seed=7)(SAMPLES), sent)


@pytest.mark.slow
def test_two_ranks_calibrate_on_the_text_of_the_first(beginning: Path, tmp_path: Path) -> None:
    one = prune(beginning, "self", tmp_path / "one").record
    arguments = [str(beginning), str(tmp_path / "two"), "--recipe=wanda", "--calibration=self", "--device=cpu"]
    numbers = [f"--samples={SAMPLES}", f"--seqlen={SEQLEN}"]
    started(2, "-m", "besa", "prune", *arguments, *numbers, BESA_CACHE=str(tmp_path / "cache-of-two"))
    two = json.loads((tmp_path / "two" / "besa_run.json").read_text())
    assert two["ranks"] == 2
    assert two["calibration"] == one.calibration
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == (
        tmp_path / "one" / "model.safetensors"
    ).read_bytes()
    assert len(list((tmp_path / "cache-of-two" / "own-text").glob("*.safetensors"))) == 1


def test_results_of_other_calibrations_have_other_keys(beginning: Path, tmp_path: Path) -> None:
    recipe = besa.Recipe.load("wanda")
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("The same words.")
    a, b = (str(tmp_path / f"{name}.txt") for name in ("a", "b"))

    def key(calibration: str, chat: bool = False) -> str:
        return Workspace(tmp_path, Conditions(str(beginning), calibration, chat=chat), Measures()).key(recipe, 0)

    different = ["c4", "code", "mix", "self", "c4:0.5,self:0.5", "c4:0.4,self:0.6", "self:0.5,c4:0.5", a]
    keys = [*map(key, different), key("c4", chat=True), key("self", chat=True)]
    assert len(set(keys)) == len(keys)
    assert key(f"{a}:1,c4:1") == key(f"{b}:0.5,c4:0.5")  # files by what is in them, weights by shares
    (tmp_path / "b.txt").write_text("Others.")
    assert key(f"{a}:1,c4:1") != key(f"{b}:0.5,c4:0.5")
    assert "chat" not in Workspace(tmp_path, Conditions(str(beginning)), Measures()).decisive()


def test_a_comparison_takes_them(instruct: Path, tmp_path: Path) -> None:
    text = str(tmp_path / "little.txt")
    Path(text).write_text((TINY / "heldout.txt").read_text(encoding="utf-8")[:8000], encoding="utf-8")
    command = ["compare", str(instruct), "--recipes=wanda", f"--ppl={text}", "--window=32", "--max-windows=2"]
    sizes = ["--samples=4", "--seqlen=96", "--device=cpu", f"--out={tmp_path / 'out'}"]
    assert run([*command, *sizes, "--calibration=self:0.5,wiki:0.5", "--chat"])[0] == 0
    (record,) = (tmp_path / "out").glob("*.run.json")
    calibration = json.loads(record.read_text())["calibration"]
    assert calibration["chat"] is True
    assert [part["beginning"].startswith("<user> ") for part in calibration["parts"]] == [True, False]
    table = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert table["calibration"] == "4 × 96 tokens of self:0.5,wiki:0.5 as dialogues"
    assert "was made under other conditions" in run([*command, *sizes, "--calibration=self:0.5,wiki:0.5"])[1]


def run(arguments: list[str]) -> tuple[int, str]:
    """The exit code of a command, and its errors."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        patch.setattr("sys.argv", ["besa", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0), said.getvalue()
    return 0, said.getvalue()


# --- what cannot be ---


def test_a_model_without_a_template_is_refused(tmp_path: Path) -> None:
    for calibration in ("c4", "self"):
        said = refused(lambda source=calibration: prune(TINY, source, tmp_path / "out", chat=True))  # type: ignore[misc]
        assert said.startswith("--chat: the tokenizer has no chat template")
    assert not (tmp_path / "out.partial").exists()
    code, error = run(["prune", str(TINY), str(tmp_path / "out"), "--chat", "--samples=2", "--seqlen=32"])
    assert code == 2
    assert "no chat template" in " ".join(error.split())


def test_a_template_that_fails_is_told(tmp_path: Path) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.chat_template = "{{ raise_exception('Only one turn') }}"

    folder = with_tokenizer(tmp_path / "model", change)
    assert "template fails (Only one turn): calibrate on plain text" in refused(
        lambda: prune(folder, "c4", tmp_path / "out", chat=True)
    )


def test_bad_syntax_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    code, error = run(["prune", str(TINY), str(tmp_path / "out"), "--calibration=c4:0.5,code"])
    assert code == 2
    assert "gives code no weight: write it as c4:0.5,code:0.5." in " ".join(error.split())


def test_a_model_without_room_is_refused(beginning: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "available_bytes", lambda _: 1_000_000)
    said = refused(lambda: prune(beginning, "self", tmp_path / "out"))
    assert "needs the whole model in memory, 0.0 GB on cpu, where 0.0 GB are free" in said
    assert not (tmp_path / "out.partial").exists()


def test_sequences_that_are_too_short_are_refused(beginning: Path, instruct: Path) -> None:
    assert "ask for a --seqlen of at least 16" in refused(lambda: author(beginning, seqlen=15)(4))
    assert "answers fill too few sequences of 16 tokens" in refused(lambda: author(instruct, chat=True, seqlen=16)(4))


def test_outputs_that_are_not_finite_are_refused(beginning: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(beginning).eval()
    model.model.norm.weight.data[0] = torch.nan
    identity: dict[str, Any] = {"fingerprint": None, "dtype": "float32"}
    broken = author(beginning, decoder=DecoderInMemory(model), opened=model, identity=identity)
    assert "LlamaForCausalLM are not finite" in refused(lambda: broken(4))


def test_a_cache_that_is_a_file_is_told_before_the_work(
    beginning: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("")
    monkeypatch.setattr(own_text, "load_model", lambda *_: pytest.fail("it is written"))
    assert "cannot be written" in refused(lambda: author(beginning)(4))
