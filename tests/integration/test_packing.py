"""Packed checkpoints: smaller, lossless both ways, refused in a sentence where they cannot be."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import besa
from besa import BesaError, Recipe
from besa.checkpoint import packing, writer
from besa.checkpoint.inspection import inspect
from besa.models.source import locate
from besa.storage.formats import bitmask
from besa.storage.formats.container import Container
from tests.slowly import some_slow

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
TEXT = str(TINY / "calibration.txt")
SIZES = {"samples": 2, "seqlen": 16}
WEIGHTS = "bitmask.safetensors"
FORMS = ["float32", "bfloat16", "joint", "symmetric", "mixed"]


def pruned(form: str, out: Path) -> Path:
    """The tiny Llama at 50 %, in one of the forms that besa writes."""
    if form in ("float32", "bfloat16"):
        besa.compress(TINY, "wanda", TEXT, out=out, dtype=form, **SIZES)
    elif form == "mixed":  # of the linears of a block some are sparse, some have too few zeros, some none
        recipe = Recipe.load("wanda").with_exceptions(["*.k_proj"], ["*.v_proj=0.02"])
        besa.compress(TINY, recipe, TEXT, out=out, **SIZES)
    else:
        grouped = ["quantization.group=32"] if form == "joint" else ["quantization.symmetric=true"]
        recipe = Recipe.load("wanda-int4", overrides=grouped).with_exceptions(["*.k_proj"], [])
        besa.compress(TINY, recipe, TEXT, out=out, **SIZES)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder for each form, with `dense` and `packed` in it."""

    @cache
    def make(form: str) -> Path:
        folder = tmp_path_factory.mktemp(form)
        besa.pack(pruned(form, folder / "dense"), folder / "packed")
        return folder

    return make


@pytest.fixture(params=some_slow(FORMS, {"bfloat16", "symmetric"}))
def checkpoint(request: pytest.FixtureRequest, made: Callable[[str], Path]) -> Path:
    return made(request.param)


@pytest.fixture
def plain(made: Callable[[str], Path]) -> Path:
    return made("float32")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


def test_round_trip_is_equal_to_the_bit(checkpoint: Path, tmp_path: Path) -> None:
    besa.unpack(checkpoint / "packed", tmp_path / "again")
    assert_equal(tensors_of(tmp_path / "again"), tensors_of(checkpoint / "dense"))
    assert config_of(tmp_path / "again") == config_of(checkpoint / "dense")
    names = {path.name for path in (checkpoint / "dense").iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    assert {path.name for path in tmp_path.iterdir()} == {"again"}


def test_no_linear_gets_larger_and_those_with_too_few_zeros_stay(checkpoint: Path) -> None:
    before, after = tensors_of(checkpoint / "dense"), tensors_of(checkpoint / "packed")

    def size(tensors: dict[str, torch.Tensor], linear: str) -> int:
        return sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(f"{linear}."))

    linears = {name.rpartition(".")[0] for name in before if "_proj.weight" in name}
    packed = {name.removesuffix(".weight_mask") for name in after if name.endswith(".weight_mask")}
    assert packed
    for linear in linears:
        assert size(after, linear) < size(before, linear) or linear not in packed, linear
    stay = {name for name in linears if name.endswith((".k_proj", ".v_proj"))}
    if checkpoint.name.startswith("mixed"):
        assert packed == linears - stay
    for name, tensor in after.items():
        if name.rpartition(".")[0] not in packed:
            assert torch.equal(tensor, before[name])


def test_bytes_that_half_the_weights_take() -> None:
    """Of bfloat16, one bit of mask for each weight and 8 of values: 9/16 of the dense bytes and little more."""
    w_OI = torch.randn(1024, 2048).bfloat16()
    w_OI[w_OI.abs() < w_OI.abs().float().median()] = 0
    share = bitmask.pack(w_OI).nbytes / w_OI.nbytes
    assert 0.5625 <= share <= 0.57


def test_header_names_format_and_version(plain: Path) -> None:
    config = config_of(plain / "packed")
    header = {"format": "bitmask", "version": 2}
    assert config["quantization_config"] == {"quant_method": "besa", **header, "sharded": False}
    assert config["besa"]["recipe"] == "wanda"
    with safe_open(plain / "packed" / WEIGHTS, "pt") as file:
        assert json.loads(file.metadata()["besa"]) == header


def test_inspect_counts_the_same_zeros_and_the_bytes_of_the_files(checkpoint: Path) -> None:
    dense, packed = (inspect(locate(checkpoint / name)) for name in ("dense", "packed"))
    assert [(part.name, part.zeros) for part in packed.linears] == [(part.name, part.zeros) for part in dense.linears]
    stored = tensors_of(checkpoint / "packed")
    assert packed.bytes == sum(tensor.nbytes for name, tensor in stored.items() if "_proj." in name)
    assert packed.bits_per_weight == 8 * packed.bytes / packed.weights < dense.bits_per_weight
    up = next(part for part in packed.linears if part.name.endswith("layers.1.mlp.up_proj"))
    assert up.parts["masks"] == stored["model.layers.1.mlp.up_proj.weight_mask"].nbytes
    assert up.bytes == sum(up.parts.values())


def test_rounding_first(plain: Path, tmp_path: Path) -> None:
    besa.pack(plain / "dense", tmp_path / "packed", dtype="bfloat16")
    besa.unpack(tmp_path / "packed", tmp_path / "again")
    rounded = {name: tensor.bfloat16() for name, tensor in tensors_of(plain / "dense").items()}
    assert_equal(tensors_of(tmp_path / "again"), rounded)
    assert config_of(tmp_path / "packed")["dtype"] == "bfloat16"
    assert besa.load(tmp_path / "packed").dtype == torch.bfloat16


def test_weights_without_their_files_are_refused(plain: Path, tmp_path: Path) -> None:
    """In one sentence, where transformers allows them."""
    besa.pack(plain / "dense", tmp_path / "packed")
    config = AutoConfig.from_pretrained(tmp_path / "packed")
    weights = tensors_of(tmp_path / "packed")
    with pytest.raises(BesaError, match="give `from_pretrained` the folder"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights)


def test_shards(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "ONE_FILE", 0)
    besa.pack(plain / "dense", tmp_path / "packed")
    besa.unpack(tmp_path / "packed", tmp_path / "again")
    assert len(list((tmp_path / "packed").glob("bitmask-*-of-*.safetensors"))) > 8
    assert_equal(tensors_of(tmp_path / "again"), tensors_of(plain / "dense"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    next(iter((tmp_path / "packed").glob("bitmask-00004-*"))).unlink()
    with pytest.raises(BesaError, match="incomplete"):
        besa.load(tmp_path / "packed")


def in_double(folder: Path) -> Path:
    shutil.copytree(TINY, folder)
    tensors = {name: own.double() for name, own in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_refusals_leave_nothing_behind(plain: Path, made: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for action, says in [
        (lambda: besa.pack(plain / "packed", out), "packed already"),
        (lambda: besa.unpack(plain / "dense", out), "not packed"),
        (lambda: besa.pack(TINY, out), "too few zeros"),
        (
            lambda: besa.pack(in_double(tmp_path.with_name(f"{tmp_path.name}-double")), out),
            "cannot hold float64: choose --dtype float32",
        ),
        (lambda: besa.pack(tmp_path / "nowhere", out), "not a model folder"),
        (lambda: besa.pack(plain / "dense", plain), "exists already"),
        (lambda: besa.compress(plain / "packed", "wanda", TEXT, out=out, **SIZES), "besa unpack"),
        (lambda: besa.compress(plain / "packed", "wanda", TEXT, **SIZES), "besa unpack"),
        (lambda: besa.pack(made("joint") / "dense", out, dtype="bfloat16"), "leave out --dtype"),
    ]:
        with pytest.raises(BesaError, match=says):
            action()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["float32", "bfloat16", "joint", "mixed"])
def test_a_full_disk_is_seen_before_the_work(
    form: str, made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked for is a little less than what will be written, once in parts and once joined."""
    pair, asked = made(form), list[int]()
    monkeypatch.setattr(packing, "check_space", lambda out, size: asked.append(size))
    besa.unpack(pair / "packed", tmp_path / "dense")
    besa.pack(pair / "dense", tmp_path / "packed", head="int8")
    for size, folder in zip(asked, ("dense", "packed"), strict=True):
        written = 2 * sum(path.stat().st_size for path in (tmp_path / folder).glob("*.safetensors"))
        assert 0.7 * written < size < written, folder
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    for action in (besa.pack, besa.unpack):
        before = pair / ("dense" if action is besa.pack else "packed")
        with pytest.raises(BesaError, match=r"out needs .* MB but only 100.00 kB are free there: make room first"):
            action(before, tmp_path / "out", progress=lambda *each: pytest.fail("it began"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "packed"]


def test_codes_that_a_bitmask_holds_in_more_bits(tmp_path: Path) -> None:
    recipe = Recipe.load("wanda-int4", overrides=["quantization.bits=3"])
    besa.compress(TINY, recipe, TEXT, out=tmp_path / "dense", **SIZES)
    with pytest.raises(BesaError) as refusal:
        besa.pack(tmp_path / "dense", tmp_path / "packed")
    assert str(refusal.value).endswith(
        "no linear would get smaller, because a bitmask takes 4 bits for each kept code of 3, and one more for "
        "every weight: prune more than 50 % of them."
    )


def test_numbers_too_large_for_a_dtype_are_refused(plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain / "dense", tmp_path / "large")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "besa_run.json").unlink()  # whose digest is of other weights
    with pytest.raises(BesaError, match="too large for float16"):
        besa.pack(folder, tmp_path / "out", dtype="float16")
    assert {path.name for path in tmp_path.iterdir()} == {"large"}


UP = "model.layers.1.mlp.up_proj"
DAMAGES = {
    "another version": ({}, {"version": 3}, "version 3"),
    "version 1 without what marks it": ({}, {"version": 1}, "version 1"),
    "no version": ({}, {"version": None}, "version None"),
    "a bit too many": ({"weight_mask": lambda mask: mask.index_fill(1, torch.tensor(0), -1)}, {}, "do not fit"),
    "values cut": ({"weight_values": lambda values: values[:100].clone()}, {}, "do not fit"),
    "offsets moved": ({"weight_offsets": lambda offsets: offsets + 4}, {}, "do not fit"),
    "shape of words": ({"weight_shape": lambda shape: shape.float()}, {}, "no shape"),
    "another shape": ({"weight_shape": lambda shape: shape.flip(0)}, {}, "do not fit"),
    "negative shape": ({"weight_shape": lambda shape: -shape}, {}, "do not fit"),
    "values of integers": ({"weight_values": lambda values: values.view(torch.int32)}, {}, "do not fit"),
    "codes of another format": ({}, {"codes": {"format": "gptq"}}, "does not read"),
    "codes of no format": ({}, {"codes": "pack-quantized"}, "does not read"),
    "codes of no bits": ({}, {"codes": {"format": "pack-quantized"}}, "how many bits"),
    "no values": ({"weight_values": None}, {}, "lacks"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_containers_are_refused(damage: str, plain: Path, tmp_path: Path) -> None:
    changes, header, says = DAMAGES[damage]
    folder = shutil.copytree(plain / "packed", tmp_path / "damaged")
    tensors = load_file(folder / WEIGHTS)
    for key, change in changes.items():
        tensor = tensors.pop(f"{UP}.{key}")
        if change is not None:
            tensors[f"{UP}.{key}"] = change(tensor)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = config_of(folder)
    config["quantization_config"] |= header
    (folder / "config.json").write_text(json.dumps(config))
    for action in (lambda: besa.unpack(folder, tmp_path / "out"), lambda: besa.load(folder)):
        with pytest.raises(BesaError, match=says):
            action()
    assert {path.name for path in tmp_path.iterdir()} == {"damaged"}


@pytest.mark.parametrize(("form", "says"), [("joint", "has no weight_zero_point"), ("symmetric", "says symmetric")])
def test_zero_points_are_there_if_config_json_says_so(
    form: str, says: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """Without them, the codes would mean other numbers."""
    folder = shutil.copytree(made(form) / "packed", tmp_path / "damaged")
    tensors = load_file(folder / WEIGHTS)
    if tensors.pop(name := f"{UP}.weight_zero_point", None) is None:
        tensors[name] = torch.full(tensors[f"{UP}.weight_scale"].shape, 7, dtype=torch.uint8)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    for action in (lambda: besa.unpack(folder, tmp_path / "out"), lambda: besa.load(folder)):
        with pytest.raises(BesaError, match=says):
            action()


def test_values_that_are_no_numbers_are_refused(plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain / "packed", tmp_path / "damaged")
    tensors = load_file(folder / WEIGHTS)
    tensors[f"{UP}.weight_values"][9] = torch.nan
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(BesaError, match="NaN"):
        besa.unpack(folder, tmp_path / "out")


def test_columns_in_another_order_are_refused(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(made("symmetric") / "dense", tmp_path / "dense")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {f"{UP}.weight_g_idx": torch.arange(96)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "besa_run.json").unlink()  # whose digest is of other weights
    with pytest.raises(BesaError, match="weight_g_idx"):
        besa.pack(folder, tmp_path / "out")


def test_a_container_reads_as_what_it_was_packed_from(checkpoint: Path) -> None:
    files, expected = Container(checkpoint / "packed"), tensors_of(checkpoint / "dense")
    assert_equal(dict(files.read(files.names)), expected)
    assert dict(files.shapes()) == {name: tuple(tensor.shape) for name, tensor in expected.items()}
