"""A recipe: the choices that make a pruning method, and its sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from besa.errors import BesaError
from besa.learning import Learning
from besa.methods.allocation import Allocation, Uniform
from besa.methods.allocation.descent import Descent
from besa.methods.complaints import first_complaint
from besa.methods.distilling import Distilling, NoDistilling
from besa.methods.dropping import Dropping, NoDropping
from besa.methods.finetuning import Finetuning, NoFinetuning
from besa.methods.fitting import CHECKS
from besa.methods.importance import Importance, Wanda
from besa.methods.recipe_files import content_of, twice
from besa.methods.reconstruction import NoReconstruction, Reconstruction
from besa.methods.targets import Targets, UniformTargets
from besa.methods.targets.targeting import Targeting
from besa.models.units import Granularity
from besa.quantization import NoQuantization, Quantization
from besa.settings import Settings
from besa.storage.names import check_plain


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

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for check in CHECKS:
            check(self)
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
        loaded = cls._validated(recipe, content_of(recipe, sparsity, overrides, cls.model_fields))
        return loaded if sparsity is None else loaded._meant_by_sparsity()

    @classmethod
    def _validated(cls, name: str | Path, content: Mapping[str, Any]) -> Recipe:
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise BesaError(f"Recipe {name}: {first_complaint(error, cls.model_fields)}.") from None
