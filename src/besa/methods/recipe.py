"""A recipe: the choices that make a pruning method, and its sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from besa.errors import BesaError
from besa.methods.allocation import Allocation, Uniform
from besa.methods.allocation.descent import Descent
from besa.methods.distilling import Distilling, NoDistilling
from besa.methods.dropping import Dropping, NoDropping
from besa.methods.finetuning import Finetuning, NoFinetuning
from besa.methods.importance import Importance, Wanda
from besa.methods.reconstruction import NoReconstruction, Reconstruction
from besa.methods.shipped import RECIPES, shipped
from besa.methods.targets import Targets, UniformTargets
from besa.methods.targets.targeting import Targeting
from besa.models.units import Granularity
from besa.quantization import NoQuantization, Quantization
from besa.settings import Learning, Settings
from besa.storage.names import check_plain, path_of

DEEPEST = 8  # levels of YAML
PATTERNS = {  # what the settings with patterns must be, in words
    "skip": "a list of patterns, such as ['*.k_proj']",
    "sparsity_of": "patterns with a sparsity each, such as {'*.k_proj': 0.3}",
}


def _checked_pattern(pattern: str) -> str:
    """Check that a pattern could match a name.

    Raises:
        ValueError: it is empty.
    """
    if not pattern.strip():
        raise ValueError("a skip pattern is empty: write one such as *.k_proj, or leave it out")
    return pattern


class Recipe(Settings):
    """Importance, allocation, reconstruction, fine-tuning and quantisation, applied block by block; then distilling.

    Whole experts go before; the sparsity is of the weights that stay.
    """

    name: Annotated[str, AfterValidator(check_plain)] = "custom"
    sparsity: float = Field(default=0.5, ge=0, lt=1, description="share of the prunable weights that become zero")
    skip: tuple[Annotated[str, AfterValidator(_checked_pattern)], ...] = Field(
        default=(), description="patterns of names of linears that stay dense"
    )
    sparsity_of: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default={}, description="patterns of names of linears, each with its own sparsity"
    )
    experts: Dropping = Field(default=NoDropping(), description="Which whole experts of a mixture go, before all else?")
    targets: Targets = Field(default=UniformTargets(), description="How many weights may each block lose?")
    importance: Importance = Field(default=Wanda(), description="Which weights of a row matter least?")
    allocation: Allocation = Field(default=Uniform(), description="How many weights may each row and linear lose?")
    reconstruction: Reconstruction = Field(
        default=NoReconstruction(), description="May the kept weights of a linear change to compensate?"
    )
    finetune: Finetuning = Field(default=NoFinetuning(), description="May the kept weights of a block change together?")
    distill: Distilling = Field(default=NoDistilling(), description="May the whole model change afterwards?")
    quantization: Quantization = Field(default=NoQuantization(), description="How many bits do kept weights have?")

    @model_validator(mode="before")
    @classmethod
    def _leads_to_experts(cls, content: Any) -> Any:
        allocation = content.get("allocation") if isinstance(content, dict) else None
        if isinstance(allocation, dict) and allocation.get("method") == "experts":
            raise ValueError(
                "whole experts go before the allocation, which divides the zeros among the weights that stay: set "
                "experts.method=reap or frequency, and experts.share"
            )
        return content

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        allocation, coded = self.allocation, self.quantization.coding is not None
        if coded and self.finetune.moves_weights:
            raise ValueError(
                "quantization does not go with finetune, which would move the codes: set finetune.method=none"
            )
        moved = self.reconstruction.moves_weights or self.distill.moves_weights
        if coded and moved and self.quantization.moved is None:
            raise ValueError(
                f"quantization.method={self.quantization.method} works only if kept weights do not change: set "
                "quantization.method=moved, or reconstruction.method=none and distill.method=none"
            )
        if self.quantization.learns_jointly and allocation.descent is None:
            raise ValueError(
                "quantization.clipping=joint needs an allocation that learns, and allocation.method="
                f"{allocation.method} learns nothing: set quantization.clipping=first"
            )
        if allocation.compares_errors and self.importance.power is None:
            raise ValueError(
                f"allocation.method={allocation.method} compares output errors, which "
                f"importance.method={self.importance.method} does not measure: set importance.method=wanda, or choose "
                "another allocation.method"
            )
        if allocation.whole_structures and not self.reconstruction.keeps_mask:
            raise ValueError(
                "structured pruning needs a reconstruction that keeps the mask: set reconstruction.method to none or "
                "cg, or reconstruction.mask=fixed"
            )
        own = self.reconstruction.own_importance
        if own is not None and not allocation.compares_errors and allocation.descent is None:
            if self.importance.method != own:
                raise ValueError(
                    f"importance.method={self.importance.method} would decide nothing, as reconstruction.mask=adaptive "
                    f"chooses weights by {own}: set importance.method={own}, or reconstruction.mask=fixed"
                )
            if allocation.sorts_linears:
                raise ValueError(
                    "allocation.per=linear would decide nothing, as reconstruction.mask=adaptive sorts the weights "
                    "itself: set allocation.per=row, or reconstruction.mask=fixed"
                )
        if self.experts.scoring and self.targets.measuring and not any([self.sparsity, *self.sparsity_of.values()]):
            raise ValueError(
                "every mixture loses the same number of experts, as configurations have one number for all blocks: "
                f"targets.method={self.targets.method} needs a sparsity of the weights that stay; set one, or "
                "targets.method=uniform"
            )
        only = allocation.only_sparsity
        if only is not None and {self.sparsity, *self.sparsity_of.values()} != {only}:
            raise ValueError(
                f"allocation.method={allocation.method} prunes exactly {only:.4g} of the weights with these settings: "
                f"set sparsity={only!r} and no sparsity_of"
            )
        if allocation.even and self.targets.measuring is not None:
            raise ValueError(f"allocation.method={allocation.method} works only with targets.method=uniform")
        if allocation.shaped and coded:
            raise ValueError(f"allocation.method={allocation.method} works only with quantization.method=none")
        return self

    @property
    def targeting(self) -> Targeting:
        """What decides how much each block loses: the targets, unless the allocation has its own."""
        return self.allocation.targeting or self.targets

    @property
    def group(self) -> int | None:
        """Columns in each group of an n:m pattern; None without such a pattern."""
        return self.allocation.group

    @property
    def descent(self) -> Descent | None:
        """Settings of the descent on rates, clipping or both; None if nothing is learned."""
        if self.allocation.descent is not None:
            return self.allocation.descent
        batch = self.quantization.first_batch
        return Descent(batch=batch) if batch is not None else None

    @property
    def teacher(self) -> Literal["dense", "pruned"] | None:
        """The path whose hidden states are the teacher's inputs; None without a teacher."""
        if self.allocation.teacher_path is not None:
            return self.allocation.teacher_path
        return "dense" if self.quantization.learns_first else None

    @property
    def rounds_last(self) -> bool:
        """Whether weights become codes only when the whole model has learned; until then they only have their grids."""
        return self.quantization.coding is not None and self.distill.moves_weights

    @property
    def granularity(self) -> Granularity:
        """Which linears share a budget, and whose output the loss compares."""
        return self.allocation.scope

    def losses_every(self, samples: int) -> set[int]:
        """Gradients of the dense model's loss are measured on one sequence in so many, for each of these numbers.

        Args:
            samples: calibration sequences.
        """
        asked = (self.targeting.loss_every(samples), self.allocation.loss_every(samples))
        return {every for every in asked if every is not None}

    @property
    def needs_gram(self) -> bool:
        """Whether any choice needs the Gram matrix of the linears' inputs."""
        return self.importance.needs_gram or self.reconstruction.needs_gram or self.quantization.needs_gram

    @property
    def learns_through_blocks(self) -> bool:
        """Whether anything is learned from gradients that went back through blocks."""
        return self.teacher is not None or self.finetune.moves_weights or self.distill.moves_weights

    @property
    def calibrated(self) -> bool:
        """Whether the result depends on the calibration data."""
        measures = self.targeting.measuring or self.experts.scoring or self.losses_every(1)
        return self.importance.needs_inputs or self.needs_gram or self.learns_through_blocks or bool(measures)

    def statistics_every(self, *, routed: bool) -> int:
        """One sequence in how many the statistics of the inputs are taken on.

        Args:
            routed: whether the model has experts; a share of the sequences may not reach all of them.
        """
        of_all = routed or self.needs_gram  # a Gram matrix needs more tokens than channels
        return 1 if of_all else self.importance.every

    def with_exceptions(self, skip: Sequence[str], sparsity_of: Sequence[str]) -> Recipe:
        """The recipe with further patterns.

        Args:
            skip: patterns of names of linears that stay dense.
            sparsity_of: ``pattern=sparsity`` pairs.

        Raises:
            BesaError: a pair has no sparsity in [0, 1], a pattern is given twice, or the allocation cannot make that
                sparsity.
        """
        if pattern := twice([pair.rpartition("=")[0] for pair in sparsity_of]):
            raise BesaError(f"--sparsity-of {pattern} is given twice: give it once.")
        sparsities = dict(self.sparsity_of)
        for pair in sparsity_of:
            pattern, _, value = pair.rpartition("=")
            try:
                sparsities[pattern] = float(value)
            except ValueError:
                sparsities[pattern] = -1.0
            if not (pattern and 0 <= sparsities[pattern] <= 1):
                raise BesaError(f"--sparsity-of {pair}: write it as pattern=sparsity, such as *.k_proj=0.3.")
        exceptions = {"skip": (*self.skip, *skip), "sparsity_of": sparsities}
        return self._validated(self.name, self.model_dump() | exceptions)

    def at(self, sparsity: float) -> Recipe:
        """The recipe with another sparsity.

        Raises:
            BesaError: the sparsity is out of bounds, or does not go with the rest of the recipe.
        """
        return self._validated(self.name, self.model_dump() | {"sparsity": sparsity})._meant_by_sparsity()

    def _meant_by_sparsity(self) -> Recipe:
        """The recipe, if its sparsity decides how much goes.

        Raises:
            BesaError: another setting does.
        """
        if (other := self.allocation.decided_by) is not None:
            raise BesaError(f"Recipe {self.name}: {other} decides how much goes, not the sparsity: give one of them.")
        return self

    def settled(self, ranks: int, samples: int, begun: Mapping[str, Any]) -> Recipe:
        """The recipe with what is left to a run settled in all parts that learn (`Learning.settled`).

        Args:
            ranks: that share the sequences of a step.
            samples: sequences of the calibration set.
            begun: settings of the recipe in a run that is resumed, if there is one.
        """
        learning = {name: part for name, part in self if isinstance(part, Learning)}
        settled = {name: part.settled(ranks, samples, begun.get(name, {})) for name, part in learning.items()}
        return self.model_copy(update=settled)

    def to_yaml(self) -> str:
        """The recipe as YAML, with every setting."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def load(cls, recipe: str | Path, sparsity: float | None = None, overrides: Sequence[str] = ()) -> Recipe:
        """Read a shipped recipe by name, or one from a YAML file.

        Args:
            recipe: name such as ``besa`` or ``wanda``, or path of a YAML file.
            sparsity: replaces the recipe's own.
            overrides: ``key.key=value`` pairs, the value in YAML, applied last. A pair that changes a method drops the
                recipe's settings of the former method.

        Raises:
            BesaError: there is no such recipe, it is no YAML or has a key twice, a key is unknown, or a value is out of
                bounds; or another setting decides how much goes, so that `sparsity` would change nothing.
        """
        content = _read(recipe)
        if sparsity is not None:
            content["sparsity"] = sparsity
        for override in sorted(overrides, key=lambda pair: not pair.partition("=")[0].endswith(".method")):
            _override(content, override)  # methods first, because a new method drops the settings of the former
        loaded = cls._validated(recipe, content)
        return loaded if sparsity is None else loaded._meant_by_sparsity()

    @classmethod
    def _validated(cls, name: str | Path, content: Mapping[str, Any]) -> Recipe:
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise BesaError(f"Recipe {name}: {_first_complaint(error)}.") from None


def _read(recipe: str | Path) -> dict[str, Any]:
    if recipe == "":
        raise BesaError(f"The name of the recipe is empty: choose one of {', '.join(shipped())}, or give a YAML file.")
    source = RECIPES / f"{recipe}.yaml" if str(recipe) in shipped() else path_of(recipe)
    if isinstance(source, Path) and source.exists() and not source.is_file():  # reading a pipe would wait forever
        raise BesaError(f"Recipe {recipe} is no file: choose one of {', '.join(shipped())}, or give a YAML file.")
    try:
        content = _yaml(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BesaError(f"No recipe {recipe}: choose one of {', '.join(shipped())}, or give a YAML file.") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise BesaError(f"Recipe {recipe} cannot be read as YAML: {reason}.") from None
    if not isinstance(content, dict) or not content:
        keys = ", ".join(Recipe.model_fields)
        raise BesaError(f"Recipe {recipe} must be a YAML mapping with some of the keys {keys}.")
    return content


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases and not deeper than recipes: a few lines of aliases can expand beyond any memory."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST or self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"it has aliases, or more than {DEEPEST} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if key := twice(keys):
                raise yaml.YAMLError(f"it has the key {key} twice")
        return node


def _yaml(text: str) -> Any:
    return yaml.load(text, _PlainLoader)


def twice(names: Sequence[str]) -> str | None:
    """The first name that appears again; None if all are different."""
    return next((name for at, name in enumerate(names) if name in names[:at]), None)


def _override(content: dict[str, Any], override: str) -> None:
    path, separator, value = override.partition("=")
    *parents, key = path.split(".")
    shown = " ".join(override.split())
    if not separator or not key:
        raise BesaError(f"--set {shown}: write it as key.key=value, such as allocation.steps=64.")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise BesaError(f"--set {shown}: {parent} is a value, not a group of settings.")
    try:
        chosen = _yaml(value)
    except (yaml.YAMLError, ValueError):  # ValueError: 2001-99-99
        raise BesaError(f"--set {shown}: the value is not YAML.") from None
    if key == "method" and content.get(key) != chosen:
        content.clear()
    content[key] = chosen


def _first_complaint(error: ValidationError) -> str:
    complaint = error.errors()[0]
    if complaint["type"] == "value_error":  # one of besa's own sentences
        return str(complaint["ctx"]["error"])
    # Of three or more parts, the second is the method's tag. Pydantic adds it; it is no key of the YAML.
    keys = [str(key) for at, key in enumerate(complaint["loc"]) if at != 1 or len(complaint["loc"]) == 2]
    place = " ".join(".".join(keys).split())
    if complaint["type"] == "extra_forbidden":
        return f"unknown key {place}"
    if complaint["type"] == "union_tag_invalid":
        return (
            f"{place}.method is {complaint['ctx']['tag']!r:.80} but must be one of {complaint['ctx']['expected_tags']}"
        )
    if complaint["type"] == "union_tag_not_found":
        return _without_method(place, complaint["input"])
    if complaint["type"] == "model_attributes_type":
        methods = ", ".join(_methods(place))
        return f"{place} is {complaint['input']!r:.80} but holds settings: set {place}.method to one of {methods}"
    if complaint["type"] in ("tuple_type", "dict_type") and place in PATTERNS:
        return f"{place} is {complaint['input']!r:.80} but must be {PATTERNS[place]}"
    message = complaint["msg"][0].lower() + complaint["msg"][1:]
    percent = complaint["type"].startswith("less_than") and "sparsity" in place
    return f"{place}: {message} (it is {complaint['input']!r:.80}{'; half is 0.5' if percent else ''})"


def _without_method(stage: str, settings: Mapping[str, Any]) -> str:
    """What to do about settings of a stage that do not say of which method they are."""
    able = [name for name, fields in _methods(stage).items() if fields.issuperset(settings)]
    choice = f"={able[0]}" if len(able) == 1 else f" to one of {', '.join(able or _methods(stage))}"
    key = f"{stage}.{' '.join(str(next(iter(settings))).split()):.80}" if settings else stage
    return f"{key} needs a method: set {stage}.method{choice}"


def _methods(stage: str) -> dict[str, frozenset[str]]:
    """The methods of a stage by name, each with the names of its settings."""
    kinds = get_args(Recipe.model_fields[stage].annotation)
    return {kind.model_fields["method"].default: frozenset(kind.model_fields) for kind in kinds}
