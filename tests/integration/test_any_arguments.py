"""Whatever a command is given, it leaves with 0, 2 or 130: commands and options come from the app itself."""

import os
import shutil
import tempfile
from pathlib import Path

import huggingface_hub.constants
import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from besa.cli import app
from besa.runtime import speed
from besa.studies import demo
from tests.calling import called

COMMANDS = typer.main.get_command(app).commands
NUMBERS = [
    "0", "-0", "1", "-1", "2", "0.5", "1e-3", "nan", "inf", "-inf", "1e308", "-1e308", "5e-324", "1e999", "1_0", "0x10",
    "٣", "1,2", "1e3", *(str(sign * number) for sign in (1, -1) for number in (10**9, 10**12, 2**63, 2**70, 10**400)),
]  # fmt: skip
NAMES = [
    "", " ", ".", "..", "/", "~", "x" * 300, "x" * 250, "a/" * 3000 + "b", "../../x", "nul\0", "\udcff", "new\nline",
    "\x1b[31m", "[bold]", "é", "*", "[", "{", "a=b", "a=", "=", "=0.5", ",", "a,b", "hf:", "hf:../..", "hf:a:b:c",
    "none.gguf", "wikitext2", "ptb=none", "wanda", "besa", "best", "int4", "allocation.steps=2", "name=../../x",
    "name=.nan", "cpu", "cuda", "float16", "mmlu", "mix", "self", "self:1,c4:1", "nowhere/x/y",
]  # fmt: skip
THERE = ["@tiny", "@pruned", "@packed", "@pipe", "@latin.yaml", "@deep.yaml", "@calibration.txt"]
VALUES = st.sampled_from(NUMBERS) | st.sampled_from(NAMES) | st.sampled_from(THERE) | st.text(max_size=20)


def write_texts(place: Path, tiny_llama: Path) -> None:
    """Little texts, and recipes that cannot be read; a call may have written its result over one of them."""
    for name in ("calibration.txt", "heldout.txt"):
        (place / name).write_text((tiny_llama / name).read_text(encoding="utf-8")[:5000], encoding="utf-8")
    (place / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    (place / "deep.yaml").write_text("[" * 10_000)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """Models of all kinds and little texts, the hub out of reach, and a demo and a bench that take no time."""
    place = tmp_path_factory.mktemp("any")
    shutil.copytree(tiny_llama_folder, place / "tiny")
    write_texts(place, tiny_llama_folder)
    os.mkfifo(place / "pipe")
    small = demo.Plan(("magnitude",), samples=2, seqlen=8, window=8, max_windows=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setattr(demo, "EMBEDDED", str(place / "tiny"))
        patch.setattr(demo, "QUICK", small)
        patch.setattr(demo, "FULL", small)
        patch.setattr(speed, "WORKS", speed.WORKS[:1])
        patch.setattr(speed, "READ", 1 << 16)
        pruned = ["prune", place / "tiny", place / "pruned", *USUAL["prune"](place)]
        for arguments in (pruned, ["pack", place / "pruned", place / "packed"]):
            assert leave(list(map(str, arguments)), place)[0] == 0
        yield place


def usual(command):
    """What makes a command quick, as far as it has such options."""
    own = {parameter.name: parameter.opts[0] for parameter in command.params}
    values = {
        "calibration": "calibration.txt", "ppl": "heldout.txt", "samples": 2, "seqlen": 8, "window": 8,
        "max_windows": 1, "recipe": "magnitude", "recipes": "magnitude", "prompt": "The city", "max_new_tokens": 2,
        "rounds": 1, "tokens": 1,
    }  # fmt: skip
    return lambda place: [
        f"{own[name]}={place / value if str(value).endswith('.txt') else value}"
        for name, value in values.items()
        if name in own
    ]


USUAL = {name: usual(command) for name, command in COMMANDS.items()}


def leave(arguments: list[str], folder: Path) -> tuple[int, str]:
    """The exit code of a command that runs in a folder, and what it says; any other exception is a bug."""
    done = called(*arguments, folder=folder)
    return done.returncode, done.stderr


@st.composite
def calls(draw):
    """A command with one to three of its parameters as nobody would give them, and the others as usual."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    parameters = [parameter for parameter in COMMANDS[name].params if parameter.name != "help"]
    odd = draw(st.lists(st.sampled_from(parameters), min_size=1, max_size=3, unique_by=lambda p: p.name))
    return name, {parameter.name: draw(VALUES) for parameter in odd}


def written(name, odd, place):
    """The call as a user types it; `@` stands for the folder of models and texts."""
    values = {key: str(place / value[1:]) if value.startswith("@") else value for key, value in odd.items()}
    arguments, places = [name, *USUAL[name](place)], []
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "argument":
            places.append(values.get(parameter.name, "out" if places else str(place / "tiny")))
        elif parameter.name in values:
            flag = getattr(parameter, "is_flag", False)
            arguments.append(parameter.opts[0] if flag else f"{parameter.opts[0]}={values[parameter.name]}")
    return [*arguments, "--", *places]


def check(call, place):
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        folder = Path(scratch, "a", "b", "c")  # names that lead out of it lead nowhere else
        folder.mkdir(parents=True)
        code, said = leave(written(*call, place), folder)
        assert code in (0, 2, 130)
        assert "Traceback" not in said
        if code == 2:
            *notices, sentence = filter(None, said.splitlines())
            assert all(notice.startswith("besa: ") for notice in notices), said
            assert sentence.startswith("besa: ")
            assert sentence.endswith(".")
            assert not [path for path in folder.rglob("*.safetensors") if ".partial" not in str(path)]


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


@given(calls())
@settings(max_examples=60, **QUIET)
def test_any_call_ends_as_it_should(place, call):
    check(call, place)


@pytest.mark.slow
@given(calls())
@settings(max_examples=1500, **QUIET)
def test_any_of_many_calls_ends_as_it_should(place, call):
    check(call, place)


@pytest.mark.parametrize(
    ("name", "odd", "words"),
    [
        ("prune", {"seed": str(2**70)}, "There is no seed 1180591620717411303424: use a whole number from 0 to"),
        ("generate", {"seed": "-1", "temperature": "1"}, "There is no seed -1"),
        ("generate", {"temperature": "nan"}, "value for '--temperature'"),
        ("generate", {"temperature": "inf"}, "There is no temperature inf"),
        ("generate", {"prompt": "a b " * 600}, "so the model has no position left"),
        ("prune", {"activation_budget": "inf"}, "--activation-budget inf: give a number of GB"),
        ("plan", {"activation_budget": "1e308"}, "--activation-budget 1e+308: give a number of GB"),
        ("plan", {"passes": "inf", "recipe": "best"}, "inf passes are more than can be counted"),
        ("plan", {"passes": "nan", "recipe": "best"}, "nan passes are nothing to spend: give a positive number"),
        ("plan", {"passes": "-1", "recipe": "best"}, "-1 passes are nothing to spend: give a positive number"),
        ("plan", {"minutes": "nan", "recipe": "best"}, "nan minutes are no time to spend: give a positive number"),
        ("plan", {"passes": "1e308", "recipe": "best"}, "1e+308 passes are more than can be counted"),
        ("plan", {"seqlen": str(10**12)}, "needs more memory than this machine has"),
        ("prune", {"seqlen": str(10**9)}, "use a longer text"),
        ("prune", {"samples": str(10**6)}, "use a longer text"),
        ("prune", {"samples": str(10**12)}, "less than or equal to 1000000"),
        ("prune", {"sparsity": "nan"}, "sparsity"),
        ("prune", {"out_dir": "x" * 300}, "File name too long"),
        ("prune", {"out_dir": ""}, "OUT is empty, or the folder that you are in: give the name of a new folder."),
        ("pack", {"out_dir": "."}, "OUT is empty, or the folder that you are in"),
        ("prune", {"model": ""}, "The name of the model is empty: give a folder,"),
        ("prune", {"calibration": ""}, "The name of a text is empty: give an embedded text (such as c4), a file, or"),
        ("compare", {"calibration": ""}, "The name of a text is empty"),
        ("prune", {"recipe": ""}, "The name of the recipe is empty: choose one of"),
        ("prune", {"skip": ""}, "a skip pattern is empty"),
        ("prune", {"out_dir": "@tiny/x"}, "lies in the folder of the model"),
        ("pack", {"out_dir": "@tiny/x"}, "lies in the folder of the model"),
        ("unpack", {"out_dir": "@tiny/x"}, "lies in the folder of the model"),
        ("shrink", {"out_dir": "@tiny/x"}, "lies in the folder of the model"),
        ("compare", {"out_dir": "@tiny/x"}, "lies in the folder of the model"),
        ("compare", {"out_dir": "@tiny"}, "is the folder of a model: choose another --out."),
        ("plan", {"calibration": "missing.txt"}, "There is no text missing.txt"),
        ("plan", {"out_dir": "@calibration.txt"}, "is no folder"),
        ("prune", {"set_": "name=../../x"}, "the name '../../x' is not plain"),
        ("prune", {"recipe": "@latin.yaml"}, "cannot be read as YAML"),
        ("prune", {"recipe": "@deep.yaml"}, "it has aliases, or more than 8 levels"),
        ("eval", {"ppl": "hf:../.."}, "write hf:<dataset>"),
        ("eval", {"json": "/"}, "No file can be written to /"),
        ("inspect", {"json": ""}, "No file can be written to ."),
        ("eval", {"json": "x" * 250}, "File name too long"),
        ("demo", {"json": "x" * 250}, "File name too long"),
        ("report", {"page": "x" * 250}, "File name too long"),
        ("eval", {"json": "@pipe"}, "No file can be written to"),
        ("report", {"page": "@calibration.txt/x"}, "No file can be written to"),
        ("simulate", {"tokens": str(2**70)}, "at most 2,147,483,647"),
        ("bench", {"rounds": str(10**12)}, "--rounds"),
        ("compare", {"seeds": str(10**12)}, "--seeds"),
        ("inspect", {"model": "nul\0"}, "embedded null byte"),
        ("inspect", {"model": "\udcff"}, "is not UTF-8"),
    ],
)
def test_what_cannot_be_is_refused_by_what_it_is(place, tmp_path, name, odd, words):
    write_texts(place, place / "tiny")
    code, said = leave(written(name, odd, place), tmp_path)
    assert code == 2
    assert words in said
    assert list(tmp_path.iterdir()) == []
    assert (place / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("name", "odd"),
    [
        ("generate", {"max_new_tokens": str(10**12)}),
        ("generate", {"temperature": "5e-324"}),
        ("generate", {"temperature": "1e308"}),
        ("eval", {"batch": str(10**12)}),
        ("eval", {"max_windows": str(10**12)}),
        ("prune", {"batch": str(2**70)}),
        ("prune", {"activation_budget": "1e290"}),
        ("plan", {"samples": str(10**6)}),
    ],
)
def test_what_is_only_odd_is_done(place, tmp_path, name, odd):
    write_texts(place, place / "tiny")
    assert leave(written(name, odd, place), tmp_path)[0] == 0
