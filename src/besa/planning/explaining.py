"""Recipes in words: purpose and cost of every shipped recipe, and what each stage of a recipe does."""

from __future__ import annotations

import inspect
import math
from typing import Any, Literal

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from besa.methods.recipe import Recipe
from besa.methods.shipped import purpose, shipped
from besa.planning.passes import WALK, passes_by_stage
from besa.settings import Settings


class RecipeEntry(BaseModel):
    """A recipe that ships.

    Attributes:
        name: of the recipe.
        purpose: what it is for.
        passes: forward passes over the calibration set, without those of the model's head.
        calibration: whether its result depends on the calibration data.
        gram: whether it needs Gram matrices of the linears' inputs.
        gradients: what it needs gradients of.
        memory: what must be in memory at once.
    """

    name: str
    purpose: str
    passes: float
    calibration: bool
    gram: bool
    gradients: list[Literal["the loss", "a block", "the model"]]
    memory: Literal["a block", "the model"]


class RecipeList(BaseModel):
    """The shipped recipes, and the calibration sequences and tokens for which their passes are counted."""

    samples: int
    seqlen: int
    recipes: list[RecipeEntry]


class StageEntry(BaseModel):
    """A stage of a recipe: the method chosen for it, what that does, and the forward passes it takes."""

    stage: str
    method: str
    does: str
    passes: float


class Explanation(BaseModel):
    """A recipe as it will run.

    Attributes:
        recipe: every setting.
        samples: calibration sequences.
        seqlen: tokens of each.
        passes: forward passes over them in all, at most.
        walk: of them, those that any recipe takes: dense path, statistics, pruned path.
        stages: what each does.
        text: the same as YAML with comments, which is a recipe again.
    """

    recipe: dict[str, Any]
    samples: int
    seqlen: int
    passes: float
    walk: float
    stages: list[StageEntry]
    text: str


def list_recipes(samples: int, seqlen: int) -> RecipeList:
    """All recipes that ship, the cheapest first.

    Args:
        samples: calibration sequences to count passes for.
        seqlen: tokens of each.
    """
    entries = [_entry(name, samples, seqlen) for name in shipped()]
    return RecipeList(samples=samples, seqlen=seqlen, recipes=sorted(entries, key=lambda entry: entry.passes))


def explain(
    recipe: Recipe, samples: int, seqlen: int, ranks: int = 1, routed: bool = False, head: float = 0.0
) -> Explanation:
    """A recipe as it will run; arguments as of `forward_passes`."""
    settled = recipe.settled(ranks, samples, {})
    passes = passes_by_stage(settled, samples, seqlen, ranks=ranks, routed=routed, head=head)
    stages = [
        StageEntry(stage=stage, method=getattr(part, "method", ""), does=_does(part), passes=passes.get(stage, 0.0))
        for stage, part in settled
        if isinstance(part, Settings)
    ]
    total, minutes = sum(passes.values()), settled.distill.time_budget
    most = "at most" if minutes is None else f"with these epochs; {deciding(minutes)} how many there are"
    heading = [
        f"# As it will run on {samples:,} sequence{'' if samples == 1 else 's'} of {seqlen:,} tokens: {total:.3g} "
        f"forward passes {most}.",
        f"# {passes[WALK]:.3g} of these are the dense path, the statistics of inputs, and the pruned path.",
    ]
    return Explanation(
        recipe=settled.model_dump(mode="json"),
        samples=samples,
        seqlen=seqlen,
        passes=total,
        walk=passes[WALK],
        stages=stages,
        text="\n".join([*heading, *_commented(settled, stages)]) + "\n",
    )


def deciding(minutes: float) -> str:
    """`1 minute decides`, `2 minutes decide`."""
    return "1 minute decides" if minutes == 1 else f"{minutes:g} minutes decide"


def _entry(name: str, samples: int, seqlen: int) -> RecipeEntry:
    recipe = Recipe.load(name)
    gradients: list[Literal["the loss", "a block", "the model"]] = []
    if recipe.losses_every(samples):
        gradients.append("the loss")
    if recipe.descent is not None or recipe.finetune.moves_weights:
        gradients.append("a block")
    if recipe.distill.moves_weights:
        gradients.append("the model")
    return RecipeEntry(
        name=name,
        purpose=purpose(name),
        passes=sum(passes_by_stage(recipe, samples, seqlen).values()),
        calibration=recipe.calibrated,
        gram=recipe.needs_gram,
        gradients=gradients,
        memory="the model" if recipe.distill.moves_weights else "a block",
    )


def _does(part: Settings) -> str:
    """What a method does: the first line of its description."""
    return (inspect.getdoc(type(part)) or "").partition("\n")[0]


def _commented(recipe: Recipe, stages: list[StageEntry]) -> list[str]:
    """The lines of a recipe in YAML, with every setting and what it means."""
    by_name = {entry.stage: entry for entry in stages}
    lines = []
    for name, field in Recipe.model_fields.items():
        value = getattr(recipe, name)
        if name not in by_name:
            lines.append(_setting(name, value, field))
            continue
        entry = by_name[name]
        cost = [f"# Forward passes: {entry.passes:.3g}."] if entry.passes else []
        lines += ["", f"# {field.description}", f"# {entry.does}", *cost, f"{name}:", f"  method: {entry.method}"]
        fields = type(value).model_fields
        lines += [f"  {_setting(key, getattr(value, key), fields[key])}" for key in fields if key != "method"]
    return lines


def _setting(name: str, value: Any, field: FieldInfo) -> str:
    """A line of YAML."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()
    return f"{name}: {text}  # {field.description}" if field.description else f"{name}: {text}"
