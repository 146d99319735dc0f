"""Checkpoints that are not as they were written, or as nobody writes them: found by digests, and by one check."""

import hashlib
import json
import os
import random
import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import besa
from besa import BesaError, cli
from besa.checkpoint import writer
from besa.checkpoint.inspection import inspect
from besa.checkpoint.verification import seal
from besa.models.hub import CARD
from besa.models.source import locate
from besa.report import load_run
from tests.integration.kill_and_repeat import sparse_model
from tests.integration.test_families import config_of, random_model, saved
from tests.integration.test_packing import SIZES, TEXT, TINY, pruned

DENSE, PACKED = "model.safetensors", "bitmask.safetensors"
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of numbers and of codes, each dense and packed, and one that has no record."""
    folder = tmp_path_factory.mktemp("made")
    for form in ("float32", "joint"):
        besa.pack(pruned(form, folder / form), folder / f"{form}-packed")
    sparse_model(TINY, folder / "foreign")
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: shutil.copytree(made / name, tmp_path / name)


def sentence(action: Callable[[], object]) -> str:
    with pytest.raises(BesaError) as refusal:
        action()
    text = str(refusal.value)
    assert re.fullmatch(r"[^\n]+\.", text), text
    return text


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "besa_run.json").read_text())


# Digests.


def sealed(folder: Path) -> dict[str, Path]:
    """The files of a folder that have digests, by name."""
    return {path.name: path for path in sorted(folder.iterdir()) if path.name != CARD}


def assert_sealed(folder: Path) -> None:
    """Every file but the card has its digest in the record, and the folder verifies."""
    found = besa.verify(folder)
    assert (folder / CARD).is_file()
    files = sealed(folder)
    assert found.files == len(files)
    assert found.bytes == sum(path.stat().st_size for path in files.values())
    digests = record_of(folder)["files"]
    assert digests.keys() == files.keys()
    own = digests.pop("besa_run.json")
    for name, digest in digests.items():
        assert digest == hashlib.sha256(files[name].read_bytes()).hexdigest(), name
    text = files["besa_run.json"].read_text().replace(own, "0" * 64)
    assert own == hashlib.sha256(text.encode()).hexdigest()


def test_whatever_is_written_has_the_digests_of_its_own_files(made: Path, tmp_path: Path) -> None:
    for name in ("float32", "float32-packed", "joint", "joint-packed"):
        assert_sealed(made / name)
    besa.unpack(made / "joint-packed", tmp_path / "unpacked")
    assert_sealed(tmp_path / "unpacked")
    besa.shrink(made / "foreign", tmp_path / "shrunk")
    assert_sealed(tmp_path / "shrunk")
    assert record_of(made / "joint-packed")["blocks"] == record_of(made / "joint")["blocks"]


def test_a_model_without_a_record_gets_one_of_digests_alone(made: Path, tmp_path: Path) -> None:
    besa.pack(made / "foreign", tmp_path / "packed")
    assert_sealed(tmp_path / "packed")
    assert record_of(tmp_path / "packed").keys() == {"files"}
    assert "holds neither besa_run.json nor besa_eval.json" in sentence(lambda: load_run(tmp_path / "packed"))
    besa.unpack(tmp_path / "packed", tmp_path / "again")
    assert_sealed(tmp_path / "again")


def test_an_index_holds_the_digests_of_its_shards(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "ONE_FILE", 0)
    for action, out, stem in [
        (lambda out: besa.compress(TINY, "wanda", TEXT, out=out, **SIZES), tmp_path / "pruned", "model"),
        (lambda out: besa.pack(made / "float32", out), tmp_path / "packed", "bitmask"),
    ]:
        action(out)
        index = json.loads((out / f"{stem}.safetensors.index.json").read_text())
        shards = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.safetensors")}
        assert len(shards) > 8
        assert index["metadata"]["sha256"] == shards
        assert_sealed(out)


@pytest.mark.parametrize("name", ["float32", "joint-packed"])
def test_every_flipped_bit_is_found_in_its_file(name: str, copy: Callable[[str], Path]) -> None:
    folder, draw = copy(name), random.Random(0)
    paths = list(sealed(folder).values())
    assert len(paths) >= 6
    for path in [*paths * 4, *[folder / "besa_run.json"] * 40]:
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        assert str(path) in sentence(lambda: besa.verify(folder))
        path.write_bytes(content)
    besa.verify(folder)


def test_values_that_only_digests_can_tell(copy: Callable[[str], Path]) -> None:
    """A flipped bit of a value is a sound checkpoint of another model: `load` finds it when it is asked to verify."""
    folder = copy("float32-packed")
    change_tensors(folder, lambda tensors: tensors[f"{UP}.weight_values"][:1].neg_())
    besa.load(folder)
    words = f"{folder / PACKED} has changed since it was written (its sha256): get the folder anew."
    assert sentence(lambda: besa.load(folder, verify=True)) == words
    seal(folder)
    besa.load(folder, verify=True)


def template(folder: Path) -> None:
    folder.mkdir()
    (folder / "x.jinja").write_text("{{ x }}")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "lacks tokenizer.json, which was written with it"),
        (lambda folder: (folder / PACKED).unlink(), f"lacks {PACKED}"),
        (lambda folder: (folder / "besa_run.json").unlink(), "has no digests to verify"),
        (lambda folder: (folder / "besa_run.json").write_text("[]"), "besa_run.json is damaged"),
        (lambda folder: (folder / "besa_run.json").write_text("{"), "besa_run.json is damaged"),
        (lambda folder: shutil.copy(TINY / DENSE, folder), f"{DENSE} was not written with the other files"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin was not written with"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ x }}"), "chat_template.jinja was not written"),
        (lambda folder: (folder / "added_tokens.json").write_text("{}"), "added_tokens.json was not written with the"),
        (lambda folder: (folder / "modeling_x.py").write_text("x = 1"), "modeling_x.py was not written with the other"),
        (lambda folder: template(folder / "additional_chat_templates"), "x.jinja was not written with the other files"),
        (lambda folder: shutil.rmtree(folder), "is no folder"),
    ],
)
def test_what_is_missing_or_beside(damage: Callable[[Path], object], words: str, copy: Callable[[str], Path]) -> None:
    folder = copy("float32-packed")
    damage(folder)
    assert words in sentence(lambda: besa.verify(folder))


def test_a_folder_of_nothing_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    told = sentence(lambda: besa.verify(tmp_path))
    assert told == f"{tmp_path} holds no checkpoint of besa: give a folder that besa wrote."


def test_a_record_whose_list_has_changed_is_named_itself(copy: Callable[[str], Path]) -> None:
    folder = copy("float32-packed")
    record = folder / "besa_run.json"
    record.write_text(record.read_text(encoding="utf-8").replace('"tokenizer.json"', '"tokenizes.json"'), "utf-8")
    assert sentence(lambda: besa.verify(folder)).startswith(f"{record} has changed since it was written")


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a\0b", "x" * 300])
def test_a_record_that_lists_what_is_no_file_beside_it(name: str, copy: Callable[[str], Path]) -> None:
    folder = copy("float32-packed")
    record = record_of(folder)
    record["files"][name] = "0" * 64
    (folder / "besa_run.json").write_text(json.dumps(record))
    assert "does not list digests of the files beside it" in sentence(lambda: besa.verify(folder))


@pytest.mark.parametrize(
    ("name", "last", "action"), [("float32-packed", "weight_values", besa.unpack), ("float32", "weight", besa.pack)]
)
def test_what_is_made_of_damaged_weights_is_not_sealed(
    name: str, last: str, action: Callable[[Path, Path], object], copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, out = copy(name), tmp_path / "out"
    (path,) = folder.glob("*.safetensors")
    change_tensors(folder, lambda tensors: tensors[f"{UP}.{last}"][:1].neg_())
    assert sentence(lambda: action(folder, out)).startswith(f"{path} has changed since it was written (its sha256)")
    assert not out.exists()
    record = folder / "besa_run.json"
    record.write_text("[]")
    assert sentence(lambda: action(folder, out)) == f"{record} is damaged: get the folder anew."
    record.unlink()  # as the first sentence says
    action(folder, out)
    assert besa.verify(out).files == len(sealed(out))


def test_measurements_beside_are_no_damage(copy: Callable[[str], Path]) -> None:
    folder = copy("float32-packed")
    (folder / "besa_eval.json").write_text("{}")
    (folder / CARD).write_text("mine")
    besa.verify(folder)
    (folder / CARD).unlink()
    besa.verify(folder)


def test_the_command(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder = copy("float32-packed")
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys, "argv", ["besa", "verify", str(folder)])
    cli.main()
    size = sum(path.stat().st_size for path in sealed(folder).values())
    count = len(sealed(folder))
    assert capsys.readouterr().out == f"{folder}: {count} files with {size:,} bytes are as they were written\n"
    (folder / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 2
    assert f"besa: {folder / 'config.json'} has changed since it was written" in capsys.readouterr().err


# One check of what is packed, whoever opens it.


def actions(folder: Path, out: Path) -> dict[str, Callable[[], object]]:
    """All that open a checkpoint; digests are made anew, so that `verify` has to look at the numbers."""
    found: dict[str, Callable[[], object]] = {
        "load": lambda: besa.load(folder),
        "inspect": lambda: inspect(locate(folder)),
        "simulate": lambda: besa.simulate(folder),
        "verify": lambda: (seal(folder), besa.verify(folder)),
    }
    rewriting = besa.unpack if (folder / PACKED).exists() else besa.pack
    return found | {"rewrite": lambda: rewriting(folder, out)}


def at(key: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[dict[str, torch.Tensor]], object]:
    """Replace a tensor of the linear by what the function makes of it, or drop it."""

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        changed = change(tensors.pop(f"{UP}.{key}"))
        if changed is not None:
            tensors[f"{UP}.{key}"] = changed

    return damage


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.flatten()[0] = value
        return tensor

    return change


SCALES = {
    "minus one": (first(-1), "scales are not all positive numbers"),
    "zero": (first(0), "scales are not all positive numbers"),
    "NaN": (first(torch.nan), "scales are not all positive numbers"),
    "infinity": (first(torch.inf), "scales are not all positive numbers"),
    "another dtype": (lambda scales: scales.bfloat16(), "bfloat16"),
    "whole numbers": (lambda scales: scales.to(torch.int32), "not fit"),
    "double": (lambda scales: scales.double(), "not fit"),
    "a scalar": (lambda scales: torch.tensor(0.5), "not fit"),
    "one row": (lambda scales: scales[:1].clone(), "not fit"),
}
DAMAGES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = {
    "values with NaN": ("float32-packed", at("weight_values", first(torch.nan)), "hold NaN or infinity"),
    "values with infinity": ("float32-packed", at("weight_values", first(-torch.inf)), "hold NaN or infinity"),
    "norm with NaN": ("float32-packed", lambda t: t["model.norm.weight"].fill_(torch.nan), "model.norm.weight"),
    "values too long": ("float32-packed", at("weight_values", lambda v: torch.cat([v, v])), "do not fit"),
    "values but no masks": ("float32-packed", at("weight_mask", lambda mask: None), "lacks"),
    "zero point beyond": ("joint-packed", at("weight_zero_point", first(16)), "zero points are no codes of 4 bits"),
    "codes without scales": ("joint", at("weight_scale", lambda scales: None), "has no weight_scale"),
    "codes cut": ("joint", at("weight_packed", lambda codes: codes[1:].clone()), "do not fit"),
    "codes of no shape": ("joint", at("weight_shape", lambda shape: shape[:1].clone()), "holds no shape"),
    **{f"scales, {name}": ("joint-packed", at("weight_scale", how), words) for name, (how, words) in SCALES.items()},
    **{f"codes' scales, {name}": ("joint", at("weight_scale", how), words) for name, (how, words) in SCALES.items()},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_alike_whoever_opens(damage: str, copy: Callable[[str], Path], tmp_path: Path) -> None:
    name, change, words = DAMAGES[damage]
    folder = copy(name)
    change_tensors(folder, change)
    found = {sentence(action) for action in actions(folder, tmp_path / "out").values()}
    assert len(found) == 1, found
    assert words in found.pop()
    assert not (tmp_path / "out").exists()


def test_codes_beyond_their_bits(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("joint-packed")
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    about["codes"]["config_groups"]["group_0"]["weights"]["num_bits"] = 3
    change_config(folder, quantization_config=about)
    for action in actions(folder, tmp_path / "out").values():
        assert re.search(r"(values|zero points) are no codes of 3 bits", sentence(action))


def without(prefix: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        change_tensors(folder, lambda tensors: [tensors.pop(name) for name in [*tensors] if name.startswith(prefix)])

    return change


@pytest.mark.parametrize("name", ["float32", "float32-packed", "joint", "joint-packed"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("model.norm.weight"), "lacks the weight model.norm.weight"),
        (without("model.layers.7."), "lacks the weight model.layers.7."),
        (lambda folder: change_config(folder, num_hidden_layers=9), "lacks the weight model.layers.8."),
        (lambda folder: change_config(folder, num_hidden_layers=7), "holds 8 blocks, its config.json says 7"),
    ],
    ids=["no norm", "no last block", "a block more", "a block less"],
)
def test_incomplete_checkpoints(
    name: str, change: Callable[[Path], object], words: str, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy(name)
    change(folder)
    opened = actions(folder, tmp_path / "out")
    told = [sentence(opened[command]) for command in ("load", "inspect", "rewrite")]
    assert all(words in text for text in told), told
    assert not (tmp_path / "out").exists()


def all_commands(folder: Path, out: Path) -> dict[str, Callable[[], object]]:
    more: dict[str, Callable[[], object]] = {
        "eval": lambda: besa.evaluate(folder, [TEXT], window=32, max_windows=1),
        "bench": lambda: besa.bench([str(folder)], rounds=1),
        "generate": lambda: besa.generate(folder, "a"),
        "report": lambda: load_run(folder),
        "prune": lambda: besa.compress(folder, "wanda", TEXT, out=out, **SIZES),
        "shrink": lambda: besa.shrink(folder, out),
        "pack": lambda: besa.pack(folder, out),
        "plan": lambda: besa.plan(folder),
    }
    return actions(folder, out) | more


def packed_as(**said: object) -> dict[str, object]:
    return {"quantization_config": {"quant_method": "besa", **said}}


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"besa": ["a list"]}, "is damaged"),
        ({"besa": "a string"}, "is damaged"),
        ({"besa": None}, "is damaged"),
        (packed_as(format="tiles", version=2), "in the format 'tiles', version 2"),
        (packed_as(format=["bitmask"], version=2), r"in the format ['bitmask'], version 2"),
        (packed_as(format="bitmask", version=3), "version 3"),
        (packed_as(format="bitmask"), "version None"),
        ({"quantization_config": None, "besa": {"format": "tiles", "version": 1}}, "in the format 'tiles', version 1"),
        ({"quantization_config": None, "besa": {"format": "bitmask", "version": 2}}, "version 2"),
    ],
)
def test_no_command_takes_what_it_does_not_know(
    about: dict[str, object], words: str, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy("float32-packed")
    change_config(folder, **about)
    for command, action in all_commands(folder, tmp_path / "out").items():
        assert words in sentence(action), command


@pytest.mark.parametrize("name", ["float32", "float32-packed", "joint", "joint-packed"])
def test_blocks_by_the_million_are_refused_from_the_headers(
    name: str, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy(name)
    change_config(folder, num_hidden_layers=10**7)
    for command, action in actions(folder, tmp_path / "out").items():
        assert "says 10,000,000 blocks" in sentence(action), command


def test_a_plan_of_a_billion_blocks_is_refused_before_they_are_built(copy: Callable[[str], Path]) -> None:
    folder = copy("float32")
    change_config(folder, num_hidden_layers=10**9)
    said = r"^The config\.json of .* says 1,000,000,000 blocks: it is damaged\.$"
    with pytest.raises(BesaError, match=said):
        besa.plan(folder)


def piped(path: Path) -> None:
    os.mkfifo(path)


def of_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def socketed(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("kind", [piped, of_zeros, socketed])
@pytest.mark.parametrize("file", [PACKED, "config.json", "besa_run.json", "bitmask.safetensors.index.json"])
def test_pipes_devices_and_sockets_are_not_waited_for(
    file: str, kind: Callable[[Path], None], copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy("float32-packed")
    (folder / file).unlink(missing_ok=True)
    kind(folder / file)
    commands = all_commands(folder, tmp_path / "out")
    commands["verify"] = lambda: besa.verify(folder)
    for command, action in commands.items():
        assert sentence(action).startswith(f"{folder / file} is no regular file"), command


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_dense_model_that_holds_no_numbers_does_not_run(value: float, copy: Callable[[str], Path]) -> None:
    folder = copy("float32")
    change_tensors(folder, lambda tensors: tensors[f"{UP}.weight"][3, 4].fill_(value))
    words = f"The tensor {UP}.weight of {folder} holds NaN or infinity: the checkpoint is damaged."
    assert sentence(lambda: besa.load(folder)) == words
    assert sentence(lambda: besa.generate(folder, "a")) == words


def test_numbers_too_large_for_the_dtype_asked_for(copy: Callable[[str], Path]) -> None:
    folder = copy("float32")
    change_tensors(folder, lambda tensors: tensors[f"{UP}.weight"][3, 4].fill_(1e6))
    assert "too large for float16" in sentence(lambda: besa.load(folder, dtype="float16"))
    besa.load(folder)


def test_an_expert_that_is_missing_from_a_merged_weight(tmp_path: Path) -> None:
    folder = saved(random_model(config_of("mixtral")), tmp_path / "model")
    name = min(name for name in load_file(folder / DENSE) if ".experts.1." in name)
    without(name)(folder)
    assert "lacks a part of the weight model.layers." in sentence(lambda: besa.pack(folder, tmp_path / "out"))
