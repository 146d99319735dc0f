"""The recipe that a command's options describe, and what it does to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from besa.errors import BesaError

if TYPE_CHECKING:
    from besa.methods.recipe import Recipe
    from besa.planning.explaining import Explanation

DISTILLED = ("distill.epochs", "distill.minutes")  # settings that say how long a recipe distils


def recipe_of(
    name: str,
    *,
    sparsity: float | None,
    settings: list[str] | None,
    skip: list[str] | None,
    sparsity_of: list[str] | None,
    passes: float | None,
    minutes: float | None,
    samples: int,
    seqlen: int | None,
    model: str,
    trust_remote_code: bool,
) -> Recipe:
    """The recipe that the options describe.

    Raises:
        BesaError: no such recipe, a setting that it cannot have or that an option gives too, or a model that cannot be
            read.
    """
    from besa.methods.recipe import Recipe
    from besa.methods.recipe_files import twice
    from besa.planning import spending, within

    if passes is not None and minutes is not None:
        raise BesaError("A run has either passes or minutes to spend: give --passes or --minutes, not both.")
    if again := twice([setting.partition("=")[0].strip() for setting in settings or ()]):
        raise BesaError(f"--set {again} is given twice: give it once.")
    check_once("--sparsity", sparsity, settings, ("sparsity",))
    check_once("--minutes", minutes, settings, DISTILLED)
    recipe = Recipe.load(name, sparsity, settings or ()).with_exceptions(skip or (), sparsity_of or ())
    if minutes is not None:
        return within(recipe, minutes)
    if passes is None:
        return recipe
    check_once("--passes", passes, settings, DISTILLED if recipe.distill.moves_weights else ("finetune.epochs",))
    about = _about(model, trust_remote_code)
    return spending(recipe, passes, samples, about.seqlen if seqlen is None else seqlen, about.head)


def check_once(option: str, value: float | None, settings: list[str] | None, decided: tuple[str, ...]) -> None:
    """Check that no setting says what an option says.

    Args:
        option: its name.
        value: its value, if it is given.
        settings: as given, NAME=VALUE.
        decided: names of the settings that the option decides.

    Raises:
        BesaError: one does.
    """
    for name in (setting.partition("=")[0].strip() for setting in settings or ()):
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


def explained(recipe: Recipe, model: str, samples: int, seqlen: int | None, trust_remote_code: bool) -> Explanation:
    """What the stages of a recipe do to a model.

    Raises:
        BesaError: the model cannot be read.
    """
    from besa.planning import explain
    from besa.system import ranks

    about = _about(model, trust_remote_code)
    length = about.seqlen if seqlen is None else seqlen
    return explain(recipe, samples, length, ranks.count(), about.routed, about.head)


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
