"""Recipes in words: the figures are those that a plan counts, and the text is the recipe again."""

import json
import re

import pytest
import yaml

from besa.methods.recipe import Recipe
from besa.methods.shipped import RECIPES, purpose, shipped
from besa.planning import explain, forward_passes, list_recipes
from besa.settings import Settings
from tests.calling import called

NOTHING = (False, False, [], "a block")
NEEDS = {  # calibration, Gram matrices, gradients, memory
    "magnitude": NOTHING,
    "wanda": (True, False, [], "a block"),
    "ria": (True, False, [], "a block"),
    "sparsegpt": (True, True, [], "a block"),
    "besa": (True, False, ["a block"], "a block"),
    "int4": (True, False, ["a block"], "a block"),
    "fast": (True, True, ["the loss"], "a block"),
    "best": (True, True, ["the loss", "the model"], "the model"),
    "best-int8": (True, True, ["the loss", "the model"], "the model"),
}


def test_recipes_are_listed_with_what_they_need_and_cost():
    listed = list_recipes(64, 512)
    assert (listed.samples, listed.seqlen) == (64, 512)
    by_name = {entry.name: entry for entry in listed.recipes}
    assert sorted(by_name) == shipped()
    for name, needs in NEEDS.items():
        entry = by_name[name]
        assert (entry.calibration, entry.gram, entry.gradients, entry.memory) == needs, name
    for name, entry in by_name.items():
        assert entry.passes == forward_passes(Recipe.load(name), 64, 512)
        first = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        assert f"# {entry.purpose}" == first
        assert entry.purpose == purpose(name)
    assert [entry.passes for entry in listed.recipes] == sorted(entry.passes for entry in listed.recipes)


@pytest.mark.parametrize("name", shipped())
def test_an_explanation_is_the_recipe_again_with_every_setting_explained(name, tmp_path):
    recipe = Recipe.load(name, None, ["skip=['*.k_proj']", "sparsity_of={'*.0.*': 0.25}"])
    explanation = explain(recipe, 64, 512, head=0.25)
    path = tmp_path / "again.yaml"
    path.write_text(explanation.text, encoding="utf-8")
    assert Recipe.load(path) == recipe.settled(1, 64, {})
    assert explanation.recipe == recipe.settled(1, 64, {}).model_dump(mode="json")
    content = yaml.safe_load(explanation.text)
    for key, part in recipe:
        if isinstance(part, Settings):
            assert set(content[key]) == set(type(part).model_fields)  # every setting spelled out
            for setting, field in type(part).model_fields.items():
                assert not field.description or re.search(
                    rf"^  {setting}: .*  # {re.escape(field.description)}$", explanation.text, re.MULTILINE
                )


def test_passes_of_stages_add_up_and_stages_say_what_they_do():
    recipe = Recipe.load("best")
    explanation = explain(recipe, 64, 512, head=0.25)
    stages = {entry.stage: entry for entry in explanation.stages}
    assert explanation.walk == 2 + 1 / 32
    assert stages["targets"].passes == 3 / 8  # eight sequences of 64, measured for the allocation too
    assert stages["allocation"].passes == 0
    assert stages["distill"].passes == recipe.distill.passes(0.25)
    total = forward_passes(recipe, 64, 512, head=0.25)
    assert explanation.passes == total == explanation.walk + sum(entry.passes for entry in stages.values())
    assert (stages["reconstruction"].method, stages["finetune"].method) == ("admm", "none")
    text = explanation.text.splitlines()
    assert text[0] == f"# As it will run on 64 sequences of 512 tokens: {total:.3g} forward passes at most."
    at = text.index("targets:")
    assert text[at - 3 : at] == [
        "# How many weights may each block lose?",
        "# The sparsity of a block lies between that of the model and that of one threshold (`fisher`).",
        "# Forward passes: 0.375.",
    ]
    learned = {entry.stage: entry.passes for entry in explain(Recipe.load("besa"), 64, 512).stages}
    assert learned["allocation"] == 3 * 88 / 64 / 2
    assert explain(Recipe.load("int4"), 64, 512).stages[-1].passes > 0  # clipping learned first: of quantization


def test_passes_are_not_the_most_where_minutes_decide():
    text = explain(Recipe.load("best", None, ["distill.minutes=30"]), 64, 512).text.splitlines()
    assert text[0].endswith("forward passes with these epochs; 30 minutes decide how many there are.")


def test_explain_shows_the_run_that_the_options_describe_and_does_nothing(tiny_llama_folder, tmp_path):
    out = tmp_path / "out"
    asked = ["prune", tiny_llama_folder, out, "--recipe", "best", "--passes", "40", "--samples", "64"]
    asked += ["--set", "distill.rate=0.002", "--sparsity", "0.7", "--explain"]
    shown = called(*asked, folder=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    content = yaml.safe_load(shown.stdout)
    assert content["sparsity"] == 0.7
    assert content["distill"]["rate"] == 0.002
    assert content["distill"]["epochs"] > Recipe.load("best").distill.epochs
    passes = float(re.search(r"on 64 sequences of 512 tokens: ([\d.]+) forward passes", shown.stdout)[1])
    assert 35 < passes <= 40  # the head of this model included
    (tmp_path / "shown.yaml").write_text(shown.stdout)
    again = called(
        "prune", tiny_llama_folder, out, "--recipe", "shown.yaml", "--samples", "64", "--explain", folder=tmp_path
    )
    assert again.stdout == shown.stdout
    as_json = json.loads(called(*asked, "--json", "-", folder=tmp_path).stdout)
    assert as_json["text"] == shown.stdout
    assert as_json["recipe"] == content
    assert [path.name for path in tmp_path.iterdir()] == ["shown.yaml"]


def test_one_sequence_is_one():
    assert explain(Recipe.load("wanda"), 1, 64).text.startswith("# As it will run on 1 sequence of 64 tokens: ")
    assert explain(Recipe.load("wanda"), 2, 64).text.startswith("# As it will run on 2 sequences of 64 tokens: ")


def test_besa_recipes_shows_all_of_them():
    shown = called("recipes")
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    for name in shipped():
        row = next(place for place, line in enumerate(lines) if line.split()[:1] == [name])
        assert purpose(name) in lines[row]
        assert f"passes: {forward_passes(Recipe.load(name), 128, 2048):.3g}; needs: " in lines[row + 1]
    assert json.loads(called("recipes", "--json", "-").stdout) == list_recipes(128, 2048).model_dump(mode="json")
