"""Arguments of the public functions that no command line has looked at: each is right, or refused by one sentence."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import besa
from besa import BesaError
from besa.data.arguments import Bos, Bytes, Count, Dtype, Length, checked
from besa.progress import Progress, silent


@checked
def takes(
    model: str | Path,
    *,
    count: Count | None = None,
    length: Length = 2,
    budget: Bytes = 0,
    dtype: Dtype = "auto",
    bos: Bos = "auto",
    share: float = 0.5,
    texts: tuple[str, ...] | list[str] = (),
    names: Sequence[str] = (),
    window: int | Sequence[int] = 8,
    progress: Progress = silent,
) -> tuple[object, ...]:
    return model, count, length, budget, dtype, bos, share, texts, progress


def test_what_is_right_goes_through_as_it_is():
    texts = ["a"]
    given = {"count": 1, "length": 3, "budget": 0, "dtype": "float16", "bos": "no", "share": 1, "texts": texts}
    assert takes(Path("x"), **given) == (Path("x"), *given.values(), silent)
    assert takes("x", texts=texts)[-2] is texts
    assert takes.__name__ == "takes"
    with pytest.raises(TypeError, match="unexpected keyword argument 'counts'"):
        takes("x", counts=1)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("model", None, "model should be a valid string or an instance of Path, not None"),
        ("model", b"x", "model should be a valid string or an instance of Path, not b'x'"),
        ("count", 0, "count should be greater than or equal to 1, not 0"),
        ("count", "2", "count should be a valid integer, not '2'"),
        ("count", 1.0, "count should be a valid integer, not 1.0"),
        ("count", True, "count should be a valid integer, not True"),
        ("length", 1, "length should be greater than or equal to 2, not 1"),
        ("budget", -1, "budget should be greater than or equal to 0, not -1"),
        ("budget", float("inf"), "budget should be a valid integer, not inf"),
        ("dtype", "float64", "dtype should be auto, float32, bfloat16 or float16, not 'float64'"),
        ("dtype", torch.float32, "dtype should be a valid string, not torch.float32"),
        ("bos", "maybe", "bos should be auto, yes or no, not 'maybe'"),
        ("share", "x" * 100, f"share should be a valid number, not '{'x' * 79}…"),
        ("texts", [5], "texts should be a valid tuple or a valid string, not [5]"),
        ("names", "held", "names should be a list, not 'held'"),
        ("window", "8", "window should be a valid integer or a list, not '8'"),
        ("progress", None, "progress should be an instance of Progress, not None"),
    ],
)
def test_what_is_not_is_refused_by_name(name, value, sentence):
    with pytest.raises(BesaError) as caught:
        takes(**{"model": "x"} | {name: value})
    assert str(caught.value) == f"takes: {sentence}."


CALLS = {
    "compress": lambda tiny, **odd: besa.compress(tiny, "magnitude", str(tiny / "calibration.txt"), **odd),
    "plan": lambda tiny, **odd: besa.plan(tiny, "magnitude", **odd),
    "evaluate": lambda tiny, **odd: besa.evaluate(tiny, **{"texts": [str(tiny / "heldout.txt")]} | odd),
    "generate": lambda tiny, **odd: besa.generate(tiny, **{"prompt": "The"} | odd),
    "load": besa.load,
    "bench": lambda tiny, **odd: besa.bench(**{"models": [tiny]} | odd),
    "simulate": besa.simulate,
    "pack": lambda tiny, **odd: besa.pack(**{"model": tiny, "out": "out"} | odd),
    "unpack": lambda tiny, **odd: besa.unpack(**{"model": tiny, "out": "out"} | odd),
    "shrink": lambda tiny, **odd: besa.shrink(**{"model": tiny, "out": "out"} | odd),
    "verify": lambda tiny, **odd: besa.verify(**{"folder": tiny} | odd),
}
ODD = {
    "compress": [
        *({"batch": number} for number in (-1, 0)),
        *({"dtype": "foo"}, {"sparsity": 1.5}, {"seqlen": 1}, {"samples": 0}, {"seed": 1.5}, {"device": None}),
        *({"activation_budget": float("nan")}, {"tokenizer": "x"}, {"out": "a\0"}),
    ],
    "plan": [{"batch": -1}, {"dtype": "foo"}, {"sparsity": 1.5}, {"seqlen": 0}, {"samples": 0}, {"device": "tpu"}],
    "evaluate": [{"batch": -1}, {"dtype": "foo"}, {"window": 8.5}, {"limit": 0}, {"texts": "held"}, {"texts": [5]}],
    "generate": [
        *({"prompt": "\ud800"}, {"prompt": None}, {"max_new_tokens": 1.5}, {"seed": None}, {"temperature": ""}),
        *({"chat": "yes"}, {"chat": True}, {"system": 5}, {"system": "\ud800"}),
    ],
    "load": [{"dtype": "foo"}, {"device": None}],
    "bench": [{"rounds": 0}, {"models": []}, {"models": "x"}, {"dtype": "foo"}],
    "simulate": [{"tokens": 5}, {"tokens": [1.5]}, {"tokens": [0]}],
    "pack": [{"dtype": "foo"}, {"model": None}, {"out": 5}],
    "unpack": [{"model": None}],
    "shrink": [{"model": None}],
    "verify": [{"folder": None}],
}


@pytest.mark.parametrize(("name", "odd"), [(name, odd) for name, each in ODD.items() for odd in each])
def test_public_functions_refuse_before_the_work(name, odd, tiny_llama_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BesaError) as caught:
        CALLS[name](tiny_llama_folder, **odd)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert list(tmp_path.iterdir()) == []


TASKS_ALONE = {"texts": [], "tasks": ["piqa"]}


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("compress", {"dequantized": True}, "--dequantized is not used: choose a recipe that quantises, or leave it"),
        ("plan", {"dequantized": True}, "--dequantized is not used: choose a recipe that quantises, or leave it"),
        ("evaluate", {"limit": 3}, "--limit is not used: add --tasks, or leave it"),
        ("evaluate", {"hub": True}, "--hub is not used: add --tasks, or leave it"),
        ("evaluate", TASKS_ALONE | {"window": 99_999}, "--window is not used: add --ppl, or leave it"),
        ("evaluate", TASKS_ALONE | {"max_windows": 1}, "--max-windows is not used: add --ppl, or leave it"),
    ],
)
def test_what_would_not_be_used_is_refused(name, given, sentence, tiny_llama_folder):
    with pytest.raises(BesaError) as caught:
        CALLS[name](tiny_llama_folder, **given)
    assert str(caught.value) == f"{sentence} out."


def test_a_recipe_gets_another_sparsity(tiny_llama_folder):
    """One that was made before, as one that is named: by what is counted in the model."""
    text = str(tiny_llama_folder / "calibration.txt")
    recipe = besa.Recipe.load("magnitude", 0.3)
    result = besa.compress(tiny_llama_folder, recipe, text, sparsity=0.7, samples=1, seqlen=8)
    zeros = sum(int((block == 0).sum()) for name, block in result.model.named_parameters() if "_proj" in name)
    assert zeros == round(0.7 * result.record.weights)
    assert besa.plan(tiny_llama_folder, recipe, sparsity=0.7).zeros == zeros
    for call in (besa.compress, besa.plan):
        with pytest.raises(
            BesaError, match=r"^Recipe magnitude: sparsity: input should be less than 1 \(it is 1\.5; half is 0\.5\)"
        ):
            call(tiny_llama_folder, recipe, sparsity=1.5)
