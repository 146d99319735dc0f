"""The recipe that a command's options describe, and what it does to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from besa.errors import BesaError

if TYPE_CHECKING:
    from besa.methods.recipe import Recipe
    from besa.planning.explaining import Explanation

DISTILLED = ("distill.epochs", "distill.minutes")  # settings that say how long a recipe distils


@dataclass(frozen=True)
class RecipeOptions:
    """What the options of a command say of a recipe, and of what the cost of a recipe depends on.

    Attributes:
        name: of the recipe, or its file.
        sparsity: replaces the recipe's.
        settings: that replace the recipe's, NAME=VALUE.
        skip: patterns of names of linears that stay dense.
        sparsity_of: PATTERN=SPARSITY pairs.
        passes: over the calibration set that the run may spend.
        minutes: that it may spend.
        samples: calibration sequences.
        seqlen: tokens of each; None for the usual length of the model.
        model: that is pruned.
        trust_remote_code: whether its code is trusted.
    """

    name: str
    sparsity: float | None
    settings: list[str] | None
    skip: list[str] | None
    sparsity_of: list[str] | None
    passes: float | None
    minutes: float | None
    samples: int
    seqlen: int | None
    model: str
    trust_remote_code: bool

    def chosen(self) -> Recipe:
        """The recipe that the options describe.

        Raises:
            BesaError: no such recipe, a setting that it cannot have or that an option gives too, or a model that cannot
                be read.
        """
        from besa.methods.recipe import Recipe
        from besa.methods.recipe_files import twice
        from besa.planning import spending, within

        settings = self.settings or ()
        if self.passes is not None and self.minutes is not None:
            raise BesaError("A run has either passes or minutes to spend: give --passes or --minutes, not both.")
        if again := twice([setting.partition("=")[0].strip() for setting in settings]):
            raise BesaError(f"--set {again} is given twice: give it once.")
        check_once("--sparsity", self.sparsity, settings, ("sparsity",))
        check_once("--minutes", self.minutes, settings, DISTILLED)
        recipe = Recipe.load(self.name, self.sparsity, settings)
        recipe = recipe.with_exceptions(self.skip or (), self.sparsity_of or ())
        if self.minutes is not None:
            return within(recipe, self.minutes)
        if self.passes is None:
            return recipe
        decided = DISTILLED if recipe.distill.moves_weights else ("finetune.epochs",)
        check_once("--passes", self.passes, settings, decided)
        about = _about(self.model, self.trust_remote_code)
        return spending(recipe, self.passes, self.samples, self._length(about), about.head)

    def explained(self, recipe: Recipe) -> Explanation:
        """What the stages of a recipe do to the model.

        Raises:
            BesaError: the model cannot be read.
        """
        from besa.planning import explain
        from besa.system import ranks

        about = _about(self.model, self.trust_remote_code)
        return explain(recipe, self.samples, self._length(about), ranks.count(), about.routed, about.head)

    def _length(self, about: _About) -> int:
        """Tokens of a calibration sequence."""
        return about.seqlen if self.seqlen is None else self.seqlen


def check_once(option: str, value: float | None, settings: Sequence[str], decided: tuple[str, ...]) -> None:
    """Check that no setting says what an option says.

    Args:
        option: its name.
        value: its value, if it is given.
        settings: as given, NAME=VALUE.
        decided: names of the settings that the option decides.

    Raises:
        BesaError: one does.
    """
    for name in (setting.partition("=")[0].strip() for setting in settings):
        if value is not None and name in decided:
            raise BesaError(f"{option} and --set {name} decide the same: give one of them.")


def check_no_run(options: Mapping[str, object]) -> None:
    """Check that `--explain` stands beside no option of a run.

    Args:
        options: their values, by name.

    Raises:
        BesaError: one is given.
    """
    for name, value in options.items():
        if value:
            raise BesaError(f"{name} is not used, as --explain runs nothing: leave one of them out.")


@dataclass(frozen=True)
class _About:
    """What the cost of a recipe depends on, of a model: its usual length, and as of `forward_passes`."""

    seqlen: int
    routed: bool
    head: float


def _about(model: str, trust_remote_code: bool) -> _About:
    """From the configuration alone.

    Raises:
        BesaError: it cannot be read.
    """
    from besa.models.finding import find_blocks
    from besa.models.limits import positions
    from besa.models.loading import read_config, skeleton
    from besa.models.source import locate
    from besa.models.whole import head_share

    source = locate(model, trust_remote_code=trust_remote_code).local(weights=False)
    empty = skeleton(source, read_config(source))
    blocks = find_blocks(empty)
    routed = any(prunable.routed for block in blocks for prunable in block.prunables.values())
    return _About(positions(empty).usual, routed, head_share(empty, blocks))
