"""The study of batches: what its cells set, what its table compares, and that it goes on where it stopped."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import besa
from besa.methods.recipe import Recipe
from besa.studies.workspace import Conditions, Measures
from experiments.batches import STEPS, STUDIES, TUNING, learning, study, tuning
from experiments.experiment import Experiment, Options
from experiments.running import Runs
from experiments.settings import DEFAULTS


@pytest.fixture(scope="module")
def one_block(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """The tiny Llama's first block."""
    folder = tmp_path_factory.mktemp("model") / "one-block"
    AutoModelForCausalLM.from_pretrained(tiny_llama_folder, num_hidden_layers=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama_folder).save_pretrained(folder)
    return folder


def little(one: Experiment, model: Path, tiny_llama_folder: Path, work: Path) -> Runs:
    conditions = Conditions(str(model), str(tiny_llama_folder / "calibration.txt"), samples=8, seqlen=32)
    measures = Measures((str(tiny_llama_folder / "heldout.txt"),), window=32, max_windows=4)
    return Runs(one, Options(conditions, measures, setting=DEFAULTS), work)


@pytest.mark.parametrize("one", STUDIES, ids=lambda one: one.name)
def test_settings_of_all_cells_are_those_of_a_recipe(one: Experiment) -> None:
    for case in one.cases(Options(Conditions("m"), Measures(), setting=DEFAULTS, sparsity=one.sparsity)):
        recipe = case.recipe
        assert recipe is not None and recipe.sparsity == one.sparsity
        learner = (recipe.descent or recipe.finetune).model_dump()
        assert f"batch {learner['batch']}, " in case.label
        assert f", {learner['steps' if recipe.descent else 'epochs']} " in case.label


@pytest.mark.slow
def test_cells_are_compared_with_the_first_seed_by_seed(
    one_block: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    one = study("little", "besa", learning((1, 6), (4, 3)))
    found = little(one, one_block, tiny_llama_folder, tmp_path / "work").found(2)
    (name, first), (label, other) = found.rows.items()
    assert (first.mean[STEPS], other.mean[STEPS]) == (6, 3)
    recipe, calibration, text = (
        Recipe.load("besa", 0.5, ["allocation.batch=4", "allocation.steps=3"]),
        *(str(tiny_llama_folder / file) for file in ("calibration.txt", "heldout.txt")),
    )
    besa.compress(str(one_block), recipe, calibration, samples=8, seqlen=32, seed=1, out=tmp_path / "again")
    measured = besa.evaluate(tmp_path / "again", [text], window=32, max_windows=4)
    assert other.values["heldout"][1] == pytest.approx(measured.perplexity["heldout"], rel=1e-6)
    ratios = [b / a for a, b in zip(first.values["heldout"], other.values["heldout"], strict=True)]
    assert found.changes(label, name, "heldout") == pytest.approx([100 * (ratio - 1) for ratio in ratios])
    line = one.table(found).splitlines()[3]
    assert line.startswith("| batch 4, 3 steps | 2 | 3.00 ± 0.00 |")
    assert f"| {50 * sum(ratios) - 100:+.1f} % ± " in line
    assert found.text == "heldout"
    assert one.verdict(found).found.startswith("heldout: ")


def test_a_study_goes_on_where_it_stopped(
    one_block: Path, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = study("little", "fast", tuning(1, 1) | tuning(2, 1))
    done = little(one, one_block, tiny_llama_folder, tmp_path).found(1)
    assert all(row.mean[TUNING] > 0 for row in done.rows.values())
    monkeypatch.setattr("besa.studies.workspace.compress", None)
    assert little(one, one_block, tiny_llama_folder, tmp_path).found(1).rows == done.rows
