"""The study of batches: what its cells set, what its table compares, and that it goes on where it stopped."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import besa
from besa.methods.recipe import Recipe
from besa.studies.workspace import Conditions, Measures
from experiments import batches
from experiments.batches import STEPS, STUDIES, TUNING, Study, change, learning, tuning


@pytest.fixture(scope="module")
def one_block(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """The tiny Llama's first block."""
    folder = tmp_path_factory.mktemp("model") / "one-block"
    AutoModelForCausalLM.from_pretrained(tiny_llama_folder, num_hidden_layers=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama_folder).save_pretrained(folder)
    return folder


def little(model: Path, tiny_llama_folder: Path, recipe: str, cells: dict[str, list[str]]) -> Study:
    conditions = Conditions(str(model), str(tiny_llama_folder / "calibration.txt"), samples=8, seqlen=32)
    measures = Measures((str(tiny_llama_folder / "heldout.txt"),), window=32, max_windows=4)
    return Study(conditions, measures, recipe, 0.5, cells)


@pytest.mark.parametrize("name", STUDIES)
def test_settings_of_all_cells_are_those_of_a_recipe(name: str) -> None:
    study = STUDIES[name]
    for label, settings in study.cells.items():
        recipe = Recipe.load(study.recipe, study.sparsity, settings)
        learner = recipe.descent or recipe.finetune
        assert f"batch {learner.model_dump()['batch']}, " in label
        assert f", {learner.model_dump()['steps' if recipe.descent else 'epochs']} " in label


def test_cells_are_compared_with_the_first_seed_by_seed(
    one_block: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    study = little(one_block, tiny_llama_folder, "besa", learning((1, 6), (4, 3)))
    first, other = batches.carry_out(study, "little", 2, tmp_path / "work", tmp_path)
    assert (first.mean[STEPS], other.mean[STEPS]) == (6, 3)
    recipe, calibration, text = (
        Recipe.load("besa", 0.5, ["allocation.batch=4", "allocation.steps=3"]),
        *(str(tiny_llama_folder / file) for file in ("calibration.txt", "heldout.txt")),
    )
    besa.compress(str(one_block), recipe, calibration, samples=8, seqlen=32, seed=1, out=tmp_path / "again")
    found = besa.evaluate(tmp_path / "again", [text], window=32, max_windows=4)
    assert other.values["heldout"][1] == pytest.approx(found.perplexity["heldout"], rel=1e-6)
    ratios = [b / a for a, b in zip(first.values["heldout"], other.values["heldout"], strict=True)]
    assert change(other, first, "heldout") == pytest.approx([100 * (ratio - 1) for ratio in ratios])
    result = json.loads((tmp_path / "little.json").read_text(encoding="utf-8"))
    assert [row["values"]["heldout"] for row in result["rows"]] == [first.values["heldout"], other.values["heldout"]]
    assert str(tmp_path) not in json.dumps(result)
    line = (tmp_path / "little.md").read_text(encoding="utf-8").splitlines()[5]
    assert line.startswith("| batch 4, 3 steps | 2 | 3.00 ± 0.00 |")
    assert f"| {50 * sum(ratios) - 100:+.1f} % ± " in line


def test_a_study_goes_on_where_it_stopped(
    one_block: Path, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = little(one_block, tiny_llama_folder, "fast", tuning(1, 1) | tuning(2, 1))
    done = batches.carry_out(study, "little", 1, tmp_path / "work", tmp_path)
    assert all(one.mean[TUNING] > 0 for one in done)
    monkeypatch.setattr("besa.studies.workspace.compress", None)
    assert batches.carry_out(study, "little", 1, tmp_path / "work", tmp_path) == done
