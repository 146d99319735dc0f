"""Recipes: what ships parses, what is overridden arrives, and what is wrong is told in one sentence."""

import ast
import os
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import besa
from besa.errors import BesaError
from besa.methods.allocation import Besa, Uniform
from besa.methods.importance import OBS, RIA, Magnitude, Wanda
from besa.methods.recipe import Recipe
from besa.methods.reconstruction import NoReconstruction, OBSUpdate
from besa.methods.shipped import RECIPES, shipped

METHODS = {
    "besa": (Wanda(), Besa(rates="row", plain=0.5, crop="auto", steps=88), NoReconstruction()),
    "besa-layerwise": (Wanda(), Besa(rates="layer", travel=3.2), NoReconstruction()),
    "magnitude": (Magnitude(), Uniform(per="linear"), NoReconstruction()),
    "ria": (RIA(), Uniform(per="linear"), NoReconstruction()),
    "sparsegpt": (OBS(), Uniform(per="row"), OBSUpdate(mask="adaptive", damping=0.01)),
    "wanda": (Wanda(), Uniform(per="row"), NoReconstruction()),
}


def refusal(*arguments, **options) -> str:
    with pytest.raises(BesaError) as caught:
        Recipe.load(*arguments, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def test_what_ships():
    assert set(METHODS) <= set(shipped())
    assert shipped() == sorted(shipped())


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_parse_and_round_trip(name, write):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").startswith("# ")  # says what it is
    assert Recipe.load(write(recipe.to_yaml())) == recipe
    content = yaml.safe_load(recipe.to_yaml())
    assert list(content) == list(Recipe.model_fields)
    assert set(content["allocation"]) == set(type(recipe.allocation).model_fields)  # every setting spelled out


@pytest.mark.parametrize("name", METHODS)
def test_shipped_recipes_are_the_methods_they_are_named_after(name):
    recipe = Recipe.load(name)
    assert (recipe.importance, recipe.allocation, recipe.reconstruction) == METHODS[name]
    assert recipe.sparsity == 0.5
    assert recipe.needs_gram == (name == "sparsegpt")


def test_needs_gram_if_any_choice_does():
    assert Recipe(importance=OBS()).needs_gram
    assert Recipe(reconstruction=OBSUpdate()).needs_gram
    assert not Recipe().needs_gram


@pytest.mark.parametrize("allocation", ["sensitivity", "structured", "{method: nm, mixed: true}"])
def test_what_compares_errors_refuses_an_importance_that_is_none(allocation):
    changes = [f"allocation={allocation}" if "{" in allocation else f"allocation.method={allocation}"]
    Recipe.load("wanda", overrides=changes)
    assert refusal("wanda", overrides=[*changes, "importance.method=ria"]) == (
        f"Recipe wanda: allocation.method={'nm' if '{' in allocation else allocation} compares output errors, which "
        "importance.method=ria does not measure: set importance.method=wanda, or choose another allocation.method."
    )


@pytest.mark.parametrize("allocation", ["uniform", "besa", "nm"])
def test_what_only_orders_weights_takes_any_importance(allocation):
    assert Recipe.load("ria", overrides=[f"allocation.method={allocation}"]).importance == RIA()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["quantization.method=minmax", "reconstruction.method=cg"],
            "quantization.method=minmax works only if kept weights do not change",
        ),
        (
            ["quantization.method=moved", "finetune.method=adam"],
            "quantization does not go with finetune",
        ),
        (
            ["quantization.method=minmax", "distill={method: kl, learns: norms}"],
            "set quantization.method=moved, or reconstruction.method=none and distill.method=none",
        ),
        (["quantization.method=minmax"], "quantization.clipping=joint needs an allocation that learns"),
        (["allocation.method=structured", "reconstruction.method=admm"], "needs a reconstruction that keeps the mask"),
        (
            ["allocation.method=structured", "reconstruction={method: obs, mask: adaptive}"],
            "needs a reconstruction that keeps the mask",
        ),
        (
            ["allocation.method=depth", "targets.method=owl"],
            "allocation.method=depth works only with targets.method=uniform",
        ),
        (
            ["allocation.method=depth", "quantization={method: minmax, clipping: first}"],
            "allocation.method=depth works only with quantization.method=none",
        ),
        (
            ["allocation.method=nm", "targets.method=search"],
            "allocation.method=nm works only with targets.method=uniform",
        ),
    ],
)
def test_methods_that_do_not_go_together(overrides, told):
    assert told in refusal("wanda", overrides=overrides)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("importance.method=magnitude", "importance.method=magnitude would decide nothing"),
        ("allocation.per=linear", "allocation.per=linear would decide nothing"),
    ],
)
def test_what_sparsegpt_would_not_look_at_is_refused(override, told):
    assert told in refusal("sparsegpt", overrides=[override])
    Recipe.load("sparsegpt", overrides=[override, "reconstruction.mask=fixed"])
    Recipe.load("sparsegpt", overrides=["importance.method=wanda", "allocation={method: besa}"])  # rates are learned


def test_nothing_asks_which_method_it_has():
    """What a method is like, it says itself: no `isinstance` in besa names a class of a recipe's parts."""
    classes = {
        method.__name__
        for name in ("targets", "importance", "allocation", "reconstruction", "finetune", "distill", "quantization")
        for method in get_args(Recipe.model_fields[name].annotation)
    }
    assert {"UniformTargets", "Wanda", "Besa", "ADMM", "MaskedAdam", "MaskedKL", "MinMax", "Moved"} < classes
    asking = []
    for path in sorted(Path(besa.__file__).parent.rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"]
        asking += [f"{path.name}:{c.lineno}" for c in calls if classes & set(ast.unparse(c.args[1]).split(" | "))]
    assert asking == []


def test_one_setting_leaves_all_others_at_their_defaults(write):
    assert Recipe.load(write("name: custom")) == Recipe()


def test_recipes_do_not_change():
    recipe = Recipe.load("besa")
    with pytest.raises(ValidationError):
        recipe.sparsity = 0.7
    with pytest.raises(ValidationError):
        recipe.allocation.steps = 2
    assert Recipe.load("besa", sparsity=0.7).allocation == Recipe.load("besa").allocation


def test_sparsity_replaces_the_recipes_own(write):
    assert Recipe.load("wanda", sparsity=0.62).sparsity == 0.62
    assert Recipe.load("wanda", sparsity=0).sparsity == 0
    path = write("sparsity: 0.3")
    assert Recipe.load(path).sparsity == 0.3
    assert Recipe.load(path, sparsity=0.4).sparsity == 0.4
    assert Recipe.load(path, sparsity=0.4, overrides=["sparsity=0.6"]).sparsity == 0.6


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["allocation.steps=3"], {"steps": 3}),
        (["allocation.travel=1e-3"], {"travel": 0.001}),  # a string to YAML 1.1
        (["allocation.rates=layer", "allocation.mask=probability"], {"rates": "layer", "mask": "probability"}),
        (["allocation.steps=3", "allocation.steps=4"], {"steps": 4}),
        (["allocation={method: besa, penalty: 7}"], {"penalty": 7.0, "plain": 0.0, "crop": 0.5, "steps": 64}),
        ([], {}),
    ],
)
def test_overrides(overrides, changed):
    recipe = Recipe.load("besa", overrides=overrides)
    assert recipe.allocation == Besa(**{"plain": 0.5, "crop": "auto", "steps": 88} | changed)
    assert (recipe.importance, recipe.reconstruction) == (Wanda(), NoReconstruction())


def test_overrides_may_change_the_method_and_add_a_part(write):
    recipe = Recipe.load("besa", overrides=["reconstruction.method=obs", "reconstruction.mask=fixed"])
    assert recipe.reconstruction == OBSUpdate(mask="fixed")
    recipe = Recipe.load(write("name: mine"), overrides=["allocation.method=besa", "importance={method: obs}"])
    assert (recipe.name, recipe.allocation, recipe.importance) == ("mine", Besa(), OBS())
    assert Recipe.load("besa", overrides=["skip=['a=b']"]).skip == ("a=b",)


def test_another_method_begins_with_its_own_settings():
    pattern = Recipe.load("wanda", overrides=["allocation.of=8", "allocation.keep=4", "allocation.method=nm"])
    assert pattern.allocation.model_dump() == {"method": "nm", "keep": 4, "of": 8, "mixed": False}
    same = Recipe.load("besa-layerwise", overrides=["allocation.method=besa"])
    assert same == Recipe.load("besa-layerwise")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("allocation.epoch=2", "unknown key allocation."),
        ("allocation.epochs=2", "unknown key allocation.epochs: set allocation.steps"),
        ("speed=2", "unknown key speed"),
        ("allocation.steps=many", "steps: input should be a valid integer"),
        ("allocation.steps=2.5", "steps: input should be a valid integer"),
        ("allocation.steps=", "steps: input should be a valid integer"),
        ("allocation.steps.x=2", "steps is a value, not a group of settings"),
        ("allocation.steps=0", "steps: input should be greater than or equal to 1 (it is 0)"),
        ("allocation.candidate_step=0.6", "candidate_step: input should be less than or equal to 0.5 (it is 0.6)"),
        ("allocation.penalty=-1", "penalty: input should be greater than or equal to 0 (it is -1)"),
        ("allocation.penalty=.nan", "penalty: "),
        ("allocation.penalty=.inf", "penalty: "),
        ("allocation.travel=.inf", "travel: "),
        ("allocation.rates=column", "rates: input should be 'row' or 'layer' (it is 'column')"),
        ("allocation.method=magic", "allocation.method is 'magic' but must be one of 'uniform', 'besa'"),
        ("allocation=besa", "allocation is 'besa' but holds settings: set allocation.method to one of uniform, besa, "),
        ("allocation=[1, 2]", "allocation is [1, 2] but holds settings: set allocation.method to one of uniform, "),
        ("allocation=5", "allocation is 5 but holds settings: set allocation.method to one of uniform, besa, "),
        ("allocation={steps: 2}", "allocation.steps needs a method: set allocation.method=besa."),
        ("allocation={}", "allocation needs a method: set allocation.method to one of uniform, besa, "),
        ("distill={}", "distill needs a method: set distill.method to one of none, kl."),
        ("distill={epoch: 3}", "distill.epoch needs a method: set distill.method to one of none, kl."),
        ("sparsity=1", "sparsity: input should be less than 1 (it is 1; half is 0.5)"),
        ("sparsity=-0.1", "sparsity: input should be greater than or equal to 0 (it is -0.1)"),
        ("sparsity=.nan", "sparsity: "),
        ("sparsity=half", "sparsity: input should be a valid number"),
        ("sparsity={a: 1}", "sparsity: input should be a valid number"),
        (
            "sparsity_of={'*.k': 1.1}",
            "sparsity_of.*.k: input should be less than or equal to 1 (it is 1.1; half is 0.5)",
        ),
        ("sparsity_of={'*.k': .nan}", "sparsity_of.*.k: "),
        ("sparsity_of=0.3", "sparsity_of is 0.3 but must be patterns with a sparsity each, such as {'*.k_proj': 0.3}."),
        ("skip='*.k'", "skip is '*.k' but must be a list of patterns, such as ['*.k_proj']."),
        ("skip=", "skip is None but must be a list of patterns"),
        ("skip=['*.k', ' ']", "a skip pattern is empty: write one such as *.k_proj, or leave it out."),
        ("skip=[3]", "skip.0: input should be a valid string (it is 3)"),
        ("name.first=x", "--set name.first=x: name is a value, not a group of settings"),
        ("allocation.steps", "--set allocation.steps: write it as key.key=value, such as allocation.steps=64"),
        ("", "--set : write it as key.key=value"),
        ("=2", "--set =2: write it as key.key=value"),
        ("allocation.=2", "--set allocation.=2: write it as key.key=value"),
        (".steps=2", "unknown key"),
        ("allocation.steps=[", "--set allocation.steps=[: the value is not YAML"),
        ("allocation.steps=a: b: c", "the value is not YAML"),
        ("allocation.steps=!!python/none x", "the value is not YAML"),
        ("allocation.steps=2001-99-99", "--set allocation.steps=2001-99-99: "),  # a date to YAML
        ("allocation.steps=2001-01-01", "steps: input should be a valid integer"),
        ("allocation.steps=0b_", "--set allocation.steps=0b_: "),  # a binary number without digits
    ],
)
def test_overrides_that_are_wrong(override, told):
    assert told in refusal("besa", overrides=[override])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("distill.epochs=3", "distill.epochs needs a method: set distill.method=kl."),
        ("finetune.epochs=3", "finetune.epochs needs a method: set finetune.method=adam."),
        ("experts.share=0.2", "experts.share needs a method: set experts.method to one of reap, frequency."),
        ("quantization.bits=3", "quantization.bits needs a method: set quantization.method to one of minmax, moved."),
    ],
)
def test_settings_of_a_stage_that_is_off_are_told_which_methods_have_them(override, told):
    assert refusal("wanda", overrides=[override]) == f"Recipe wanda: {told}"


def test_keys_are_named_as_they_are_written():
    """Without the tag of the method that pydantic puts in between."""
    assert "unknown key allocation.epoch." in refusal("besa", overrides=["allocation.epoch=2"])
    assert ": allocation.steps: input" in refusal("besa", overrides=["allocation.steps=0"])


def test_exceptions_are_added_to_the_recipes_own(write):
    recipe = Recipe.load(write("skip: ['*.q']\nsparsity_of: {'*.k': 0.3, '*.v': 0.4}"))
    assert (recipe.skip, recipe.sparsity_of) == (("*.q",), {"*.k": 0.3, "*.v": 0.4})
    more = recipe.with_exceptions(["*.o", "m.0.*"], ["*.v=0", "*.up=1e-1", "a=b=1"])
    assert more.skip == ("*.q", "*.o", "m.0.*")
    assert more.sparsity_of == {"*.k": 0.3, "*.v": 0.0, "*.up": 0.1, "a=b": 1.0}
    assert (recipe.skip, recipe.sparsity_of) == (("*.q",), {"*.k": 0.3, "*.v": 0.4})
    assert more.model_copy(update={"skip": recipe.skip, "sparsity_of": recipe.sparsity_of}) == recipe
    assert recipe.with_exceptions([], []) == recipe
    assert Recipe.load(write(more.to_yaml())) == more


@pytest.mark.parametrize("pair", ["", "*.k", "*.k=", "=0.3", "*.k=half", "*.k=1.1", "*.k=-0.1", "*.k=nan", "*.k=inf"])
def test_exceptions_that_are_wrong(pair):
    with pytest.raises(BesaError) as caught:
        Recipe().with_exceptions([], ["*.v=0.5", pair])
    assert str(caught.value) == f"--sparsity-of {pair}: write it as pattern=sparsity, such as *.k_proj=0.3."


def test_an_empty_pattern_is_called_empty():
    with pytest.raises(BesaError, match=r"^Recipe custom: a skip pattern is empty: "):
        Recipe().with_exceptions([""], [])


def test_what_is_given_twice_is_refused():
    with pytest.raises(BesaError, match=r"^--sparsity-of \*\.q is given twice: give it once\.$"):
        Recipe().with_exceptions([], ["*.q=0.3", "*.k=0.3", "*.q=0.7"])


@given(override=st.text(max_size=30) | st.from_regex(r"(allocation\.steps|sparsity|name|importance)=[^\x00]{0,12}"))
@example("sparsity=0\n")
@example("no\nvalue")
@example("allocation.x\ny=1")
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_as_an_override_is_taken_or_refused(override):
    try:
        Recipe.load("besa", overrides=[override])
    except BesaError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, float("nan"), float("inf")])
def test_sparsity_out_of_bounds(sparsity):
    assert refusal("wanda", sparsity=sparsity).startswith("Recipe wanda: sparsity: input should be ")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            "",
            "must be a YAML mapping with some of the keys name, sparsity, skip, sparsity_of, experts, targets, "
            "importance, allocation, reconstruction, finetune, distill, quantization.",
        ),
        ("{}", "must be a YAML mapping with some of the keys name, "),
        ("- a\n- b", "must be a YAML mapping"),
        ("besa", "must be a YAML mapping"),
        ("a: b: c", "cannot be read as YAML"),
        ("sparsity: 0.5\nsparsty: 0.5", "unknown key sparsty"),
        ("1: 2", "1"),
        ("name: 3", "name: input should be a valid string (it is 3)"),
        ("allocation:", "allocation is None but holds settings"),
        ("allocation: {rates: row}", "allocation.rates needs a method: set allocation.method=besa."),
        ("sparsity: 0.5\n---\nsparsity: 0.6", "cannot be read as YAML"),
        ("!!python/object/apply:os.getcwd []", "cannot be read as YAML"),
        ("when: 2001-99-99", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (b"name: caf\xe9", "cannot be read as YAML"),
        (b"name: \x00", "cannot be read as YAML"),
        ("[" * 100_000, "it has aliases, or more than 8 levels"),
        ("- " * 5000, "it has aliases, or more than 8 levels"),
        ("skip: &a [x]\nb: *a", "it has aliases, or more than 8 levels"),
        ("sparsity: 0.5\nsparsity: 0.6", "cannot be read as YAML: it has the key sparsity twice"),
        ("allocation: {method: besa, steps: 8, steps: 9}", "it has the key steps twice"),
        ("a: &a {x: 1}\nb: {<<: *a}", "it has aliases, or more than 8 levels"),
        ("finetune: {method: adam, epochs: 2147483648}", "epochs is larger than 2,147,483,647"),
        (f"allocation: {{method: besa, steps: {10**400}}}", "steps is larger than 2,147,483,647"),
        ("allocation: {method: besa, penalty: 1.0e+300}", "penalty is larger than 1e+30: ask for less"),
        ("allocation: {method: besa, start_width: 1.0e-200}", "start_width"),
        ("distill: {method: kl, cross_entropy: 1.0e+300}", "cross_entropy is larger than 1e+30: ask for less"),
        (f"name: [{'x, ' * 10_000}]", "(it is ['x', 'x', "),
    ],
)
def test_files_that_are_wrong(write, content, told):
    path = write(content)
    sentence = refusal(path)
    assert sentence.startswith(f"Recipe {path}")
    assert told in sentence


@pytest.mark.parametrize("name", ["a", "_", "0", "besa-int4", "mine.v2_b-3", "x" * 64])
def test_plain_names(write, name):
    assert Recipe.load(write(f"name: '{name}'")).name == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../../evil",
        "/etc/evil",
        "a/b",
        "a\\\\b",
        ".hidden",
        "-dash",
        "nul\\0",
        "a b",
        "a\\n",
        "a=b",
        "é",
        "x" * 65,
    ],
)
def test_names_that_are_not_plain(write, name):
    sentence = refusal(write(f'name: "{name}"'))
    assert sentence.endswith(
        "is not plain: use at most 64 letters (a to z), digits, dots, dashes and underscores, and do not begin with "
        "a dot or a dash."
    )
    assert len(sentence) < 350


def test_overrides_meet_a_group_without_settings(write):
    assert "allocation is a value" in refusal(write("allocation:"), overrides=["allocation.steps=2"])


@pytest.mark.parametrize("name", ["wnda", "no/such/recipe.yaml"])
def test_recipes_that_do_not_exist(name):
    assert refusal(name) == (f"No recipe {name}: choose one of {', '.join(shipped())}, or give a YAML file.")


@pytest.mark.parametrize("name", ["", "nul\0", "x" * 5000])
def test_names_that_no_file_can_have(name):
    refusal(name)


def test_a_recipe_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(BesaError, match=r"is no file: choose one of"):
            Recipe.load(name)


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("wanda", [], True),
        ("wanda", ["importance.method=magnitude"], False),
        ("wanda", ["importance.method=magnitude", "experts.method=frequency"], True),
        ("wanda", ["importance.method=magnitude", "targets.method=sensitivity"], True),
        ("depth", [], True),
    ],
)
def test_whether_calibration_matters(name, overrides, expected):
    assert Recipe.load(name, overrides=overrides).calibrated is expected
