"""Damaged and hostile checkpoints: each is refused in a sentence that names the culprit, and nothing is left."""

import json
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from besa import cli
from tests.slowly import some_slow

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"
HEADER = 8 + int.from_bytes((TINY / WEIGHTS).read_bytes()[:8], "little")  # where the numbers begin
FIRST, UP = "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
COMMANDS = ("prune", "inspect", "eval")
SECONDS = 30

Damage = Callable[[Path], object]


class Hang(BaseException):
    """Nothing in besa may catch it."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny Llama to damage."""
    names = ("config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")
    folder = tmp_path / "model"
    folder.mkdir()
    for name in names:
        shutil.copyfile(TINY / name, folder / name)
    return folder


class Besa:
    """Calls the command line in this process, on one model."""

    def __init__(self, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._model, self._monkeypatch, self._capsys = model, monkeypatch, capsys
        out = model.parent / "out"
        text = ["--calibration", str(TINY / "calibration.txt"), "--samples", "2", "--seqlen", "16"]
        self._arguments = {
            "prune": [str(model), str(out), "--recipe", "wanda", *text, "--quiet"],
            "inspect": [str(model)],
            "eval": [str(model), "--ppl", str(TINY / "heldout.txt"), "--window", "64", "--max-windows", "2"],
        }

    def __call__(self, command: str) -> tuple[int, str]:
        """Exit code, and what it says on stderr."""
        self._monkeypatch.setattr(sys, "argv", ["besa", command, *self._arguments[command]])
        code = 0
        self._capsys.readouterr()

        def hang(*_: object) -> None:
            raise Hang(f"besa {command} takes more than {SECONDS} s")

        before = signal.signal(signal.SIGALRM, hang)
        signal.alarm(SECONDS)
        try:
            cli.main()
        except SystemExit as leaving:
            assert isinstance(leaving.code, int)
            code = leaving.code
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        return code, self._capsys.readouterr().err.strip()

    def refuses(self, command: str, *words: str) -> None:
        """Exit code 2, one line that holds the words, and nothing left."""
        code, complaint = self(command)
        assert code == 2, (command, complaint)
        assert_sentence(complaint)
        for word in words:
            assert word in complaint, (command, complaint)
        assert_nothing_left(self._model)


def assert_sentence(complaint: str) -> None:
    assert re.fullmatch(r"besa: [^\n]+\.", complaint), complaint
    assert complaint.count("besa: ") == 1 + complaint.count(": besa: "), complaint
    assert "Traceback" not in complaint
    assert "\x1b" not in complaint
    assert len(complaint) < 700


def assert_nothing_left(model: Path) -> None:
    assert [path.name for path in model.parent.iterdir()] == ["model"]


@pytest.fixture
def besa(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Besa:
    return Besa(model, monkeypatch, capsys)


def test_the_undamaged_copy_is_fine(besa: Besa, model: Path) -> None:
    assert [besa(command) for command in COMMANDS] == [(0, "")] * 3
    assert (model.parent / "out" / WEIGHTS).is_file()


# Damages, each a function of the folder.


def written(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str, size: int) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def config(drop: str | None = None, **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        content.pop(drop, None)
        (folder / "config.json").write_text(json.dumps(content))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        change(content)
        save_file(content, folder / WEIGHTS, {"format": "pt"})

    return damage


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Rewrite what the weight file says of its tensors, and leave their numbers."""

    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        entries = json.loads(data[8:HEADER])
        change(entries)
        text = json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[HEADER:])

    return damage


def overwritten(start: int, data: bytes) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / WEIGHTS).read_bytes())
        content[start : start + len(data)] = data
        (folder / WEIGHTS).write_bytes(content)

    return damage


def sharded(damage: Damage) -> Damage:
    """The damage of a folder whose weights are in a shard: beside a whole file an index does not count."""

    def both(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / SHARD)
        damage(folder)

    return both


def indexed(file: Any = SHARD, **changes: Any) -> Damage:
    """An index that puts all tensors into `file`; what `changes` names is replaced or added."""

    def damage(folder: Path) -> None:
        weight_map = dict.fromkeys(load_file(folder / SHARD), file)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map} | changes))

    return sharded(damage)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


NAN = torch.tensor(float("nan"))
NESTED = "[" * 100_000

WEIGHT_FILES: dict[str, tuple[Damage, list[str]]] = {
    "empty file": (written(WEIGHTS, b""), [WEIGHTS]),
    "cut in the length": (cut(WEIGHTS, 5), [WEIGHTS]),
    "cut in the header": (cut(WEIGHTS, HEADER // 2), [WEIGHTS]),
    "cut in the numbers": (cut(WEIGHTS, HEADER + 100_000), [WEIGHTS]),
    "cut by one byte": (cut(WEIGHTS, (TINY / WEIGHTS).stat().st_size - 1), [WEIGHTS]),
    "header of 2^63 bytes": (overwritten(0, b"\xff" * 7 + b"\x7f"), [WEIGHTS]),
    "header of no bytes": (overwritten(0, b"\x00" * 8), [WEIGHTS]),
    "header is no JSON": (overwritten(8, b"\x00\xff{[" * 16), [WEIGHTS]),
    "header nests": (written(WEIGHTS, (100_000).to_bytes(8, "little") + NESTED.encode()), [WEIGHTS]),
    "offsets overlap": (header(lambda entries: entries[UP].update(data_offsets=[0, 98304])), [WEIGHTS]),
    "offsets beyond the end": (header(lambda entries: entries[UP].update(data_offsets=[1 << 60, 1 << 61])), [WEIGHTS]),
    "shape of a negative": (header(lambda entries: entries[UP].update(shape=[-1, 96])), [WEIGHTS]),
    "shape does not fit": (header(lambda entries: entries[UP].update(shape=[1 << 40, 96])), [WEIGHTS]),
    "unknown dtype": (header(lambda entries: entries[UP].update(dtype="F33")), [WEIGHTS]),
    "not safetensors": (written(WEIGHTS, b"PK\x03\x04" + b"\x00" * 1000), [WEIGHTS]),
    "a folder": (lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()), [WEIGHTS]),
    "no weights": (removed(WEIGHTS), ["no .safetensors weights", "save_pretrained"]),
    "pickles only": (pickled, ["no .safetensors weights", "save_pretrained", "no pickled weights"]),
    "NaN": (tensors(lambda content: content[FIRST][3, 4].copy_(NAN)), [FIRST, "NaN", WEIGHTS]),
    "infinity": (
        tensors(lambda content: content["model.norm.weight"][0].fill_(torch.inf)),
        ["model.norm.weight", "NaN"],
    ),
    "lacks a tensor": (tensors(lambda content: content.pop(UP)), [UP]),
    "lacks the embeddings": (tensors(lambda content: content.pop("model.embed_tokens.weight")), ["embed_tokens"]),
    "tensor of another shape": (tensors(lambda content: content.update({UP: torch.ones(96, 96)})), [UP, "(96, 96)"]),
    "tensor of one number": (tensors(lambda content: content.update({UP: torch.ones(())})), [UP]),
    "no tensors": (tensors(dict.clear), []),
    "other names": (
        tensors(lambda content: content.update({f"x.{name}": content.pop(name) for name in [*content]})),
        [],
    ),
}
INDICES: dict[str, tuple[Damage, list[str]]] = {
    "index is cut": (sharded(written(INDEX, '{"weight_map": {')), [INDEX, "damaged"]),
    "index nests": (sharded(written(INDEX, NESTED)), [INDEX, "damaged"]),
    "index is a list": (sharded(written(INDEX, "[]")), [INDEX, "damaged"]),
    "index is no text": (sharded(written(INDEX, b"\xff\xfe\x00")), [INDEX, "damaged"]),
    "index without a map": (sharded(written(INDEX, "{}")), [INDEX, "damaged"]),
    "map is a list": (indexed(weight_map=["a"]), [INDEX, "damaged"]),
    "map is null": (indexed(weight_map=None), [INDEX, "damaged"]),
    "map is empty": (indexed(weight_map={}), [INDEX, "no tensors"]),
    "traversal": (indexed("../x.safetensors"), [INDEX, "'../x.safetensors'"]),
    "traversal in depth": (indexed("a/../../x.safetensors"), [INDEX, "'a/../../x.safetensors'"]),
    "absolute": (indexed("/etc/passwd"), [INDEX, "'/etc/passwd'"]),
    "absolute weights": (indexed(str(TINY / WEIGHTS)), [INDEX, str(TINY / WEIGHTS)]),
    "another kind": (indexed("pytorch_model.bin"), [INDEX, "pytorch_model.bin"]),
    "dots": (indexed(".."), [INDEX, "'..'"]),
    "missing file": (indexed("model-00002-of-00002.safetensors"), ["model-00002-of-00002.safetensors", "incomplete"]),
    "file is a number": (indexed(7), [INDEX, "'7'"]),
    "file is null": (indexed(None), [INDEX, "'None'"]),
    "file is a list": (indexed([SHARD]), [INDEX]),
    "null character": (indexed("a\x00.safetensors"), [INDEX.split(".")[0]]),
    "promises too much": (indexed(weight_map={"model.layers.99.weight": SHARD}), ["model.layers.99.weight", INDEX]),
}
CONFIGS: dict[str, tuple[Damage, list[str]]] = {
    "no config": (removed("config.json"), ["config.json"]),
    "config is empty": (written("config.json", ""), ["config"]),
    "config is cut": (cut("config.json", 300), ["config.json"]),
    "config is a list": (written("config.json", "[1, 2]"), ["config"]),
    "config is a number": (written("config.json", "7"), []),
    "config is no text": (written("config.json", b"\xff\xfe\x00"), ["config"]),
    "config nests": (written("config.json", NESTED), []),
    "config is {}": (written("config.json", "{}"), ["model_type"]),
    "unknown kind": (config(model_type="nonsense"), ["nonsense"]),
    "kind is a number": (config(model_type=7), []),
    "encoder-decoder": (config(model_type="t5", d_model=64), ["t5", "encoder-decoder"]),
    "no attention": (config("num_attention_heads", model_type="mamba"), ["mamba", "no attention"]),
    "tuples": (config(return_dict=False), ["llama", "return_dict"]),
    "no language model": (config(model_type="vit"), ["vit"]),
    "quantised": (config(quantization_config={"quant_method": "gptq", "bits": 4}), ["quanti"]),
    "blocks by the billion": (config(num_hidden_layers=10**9), ["1,000,000,000 blocks"]),
    "more blocks than there are": (config(num_hidden_layers=9), ["model.layers.8"]),
    "minus one block": (config(num_hidden_layers=-1), []),
    "no blocks": (config(num_hidden_layers=0), []),
    "blocks in words": (config(num_hidden_layers="eight"), []),
    "half a block": (config(num_hidden_layers=0.5), []),
    "wide": (config(hidden_size=10**6), ["96"]),
    "astronomically wide": (config(hidden_size=10**18), []),
    "width in words": (config(hidden_size="96"), []),
    "no width": (config(hidden_size=0), []),
    "narrow": (config(hidden_size=48), ["96"]),
    "large vocabulary": (config(vocab_size=10**8), ["embed_tokens", "1024"]),
    "astronomical vocabulary": (config(vocab_size=10**18), []),
    "negative vocabulary": (config(vocab_size=-5), []),
    "heads is a list": (config(num_attention_heads=[4]), []),
    "no heads": (config(num_attention_heads=0), []),
    "heads do not divide": (config(num_key_value_heads=3), []),
    "heads of null": (config(head_dim=0), []),
    "wide heads": (config(head_dim=10**6), []),
    "unknown activation": (config(hidden_act="nonsense"), ["nonsense"]),
    "unknown dtype": (config(dtype="float33"), ["float33"]),
    "dtype of integers": (config(dtype="int8"), []),
    "rope is a number": (config(rope_parameters=7), []),
    "rope of an unknown kind": (config(rope_parameters={"rope_type": "nonsense", "rope_theta": 1e4}), ["nonsense"]),
    "code of its own": (config(auto_map={"AutoConfig": "evil.Evil"}, model_type="evil"), ["--trust-remote-code"]),
}
TOKENIZERS: dict[str, tuple[Damage, list[str]]] = {
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], ["okenizer"]),
    "tokenizer is cut": (cut("tokenizer.json", 20_000), ["okenizer"]),
    "tokenizer is empty": (written("tokenizer.json", ""), ["okenizer"]),
    "tokenizer is garbage": (written("tokenizer.json", b"\x00\xff" * 99), ["okenizer"]),
    "tokenizer is {}": (written("tokenizer.json", "{}"), ["okenizer"]),
    "tokenizer nests": (written("tokenizer.json", NESTED), ["okenizer"]),
    "tokenizer config is cut": (cut("tokenizer_config.json", 30), ["okenizer"]),
}


def cases(damages: dict[str, tuple[Damage, list[str]]]) -> list[Any]:
    return [pytest.param(*damage, id=name) for name, damage in damages.items()]


# What a command does not read cannot hurt it, and `eval` sees NaN in what comes out.
UNHURT = {"infinity": "inspect", "lacks the embeddings": "inspect"}
IN_THE_OUTPUT = ("NaN", "infinity")


@pytest.mark.parametrize("name", [*WEIGHT_FILES, *INDICES, *CONFIGS])
def test_damage_is_refused_by_all(name: str, besa: Besa, model: Path) -> None:
    damage, words = (WEIGHT_FILES | INDICES | CONFIGS)[name]
    damage(model)
    for command in COMMANDS:
        if command == UNHURT.get(name):
            code, complaint = besa(command)
            assert (code, complaint) == (0, "") or (code == 2 and all(word in complaint for word in words))
        elif command == "eval" and name in IN_THE_OUTPUT:
            besa.refuses(command, "NaN")
        elif name in ("no blocks", "minus one block"):
            besa.refuses(command, "LlamaForCausalLM has no stack of decoder blocks")
        else:
            besa.refuses(command, str(model), *words)


def test_nan_in_a_later_block_is_found_before_the_work(besa: Besa, model: Path) -> None:
    tensors(lambda content: content[UP][3, 4].copy_(NAN))(model)
    code, complaint = besa("prune")
    assert code == 2
    assert_sentence(complaint)
    assert f"The tensor {UP} of {model / WEIGHTS} holds NaN" in complaint
    assert [path.name for path in model.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(("damage", "words"), cases(TOKENIZERS))
def test_a_damaged_tokenizer_is_refused(damage: Damage, words: list[str], besa: Besa, model: Path) -> None:
    damage(model)
    assert besa("inspect") == (0, "")  # needs none
    for command in ("prune", "eval"):
        besa.refuses(command, str(model), *words)


def flipped(folder: Path, draw: random.Random) -> None:
    path = folder / draw.choice(["config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"])
    data = bytearray(path.read_bytes())
    end = HEADER if path.name == WEIGHTS else len(data)
    for _ in range(draw.choice([1, 1, 3, 20])):
        data[draw.randrange(end)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("seed", some_slow(range(20), range(8, 20)))
def test_flipped_bits_are_harmless_or_refused(seed: int, besa: Besa, model: Path) -> None:
    flipped(model, random.Random(seed))
    for command in COMMANDS:
        code, complaint = besa(command)
        assert code in (0, 2), complaint
        if code == 0:
            assert complaint == ""
            shutil.rmtree(model.parent / "out", ignore_errors=True)
        else:
            assert_sentence(complaint)
        assert_nothing_left(model)


def test_a_sparsity_that_is_none(model: Path, besa: Besa) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"besa": {"sparsity": "x"}}))
    code, said = besa("eval")
    assert (code, said.strip()) == (2, f"besa: The config.json of {model} is damaged: under \"besa\", sparsity is 'x'.")
