"""How BESA is run: as the paper writes it, as its authors' program runs it, and with besa's defaults."""

from __future__ import annotations

from dataclasses import dataclass

from besa.methods.recipe import Recipe

# One epoch of whole sequences, one at each step, is the paper's in both readings.
EPOCH = ("allocation.crop=1", "allocation.plain={plain}", "allocation.mask={mask}", "allocation.steps={samples}")


@dataclass(frozen=True)
class Setting:
    """A reading of the paper, or none.

    Attributes:
        name: in the names of results; the paper's own results have none.
        words: what is set, for readers of a result.
        changes: of BESA's recipes; `{samples}` stands for the calibration sequences.
        layerwise: further changes where a linear has one rate.
    """

    name: str
    words: str
    changes: tuple[str, ...] = ()
    layerwise: tuple[str, ...] = ()

    def recipe(self, name: str, sparsity: float, samples: int, *settings: str) -> Recipe:
        """One of BESA's recipes in this setting; `settings` come on top."""
        plain = Recipe.load(name, sparsity)
        changes = self.changes + (self.layerwise if plain.allocation.model_dump().get("rates") == "layer" else ())
        return Recipe.load(name, sparsity, [*(change.format(samples=samples) for change in changes), *settings])


PAPER = Setting(
    "paper",
    "as the paper writes it: the plain squared error of eq. 1, the mask of eq. 5, the dense path as teacher "
    "(Algorithm 1, line 3), one epoch of whole sequences. The authors' program differs: it divides each channel's "
    "squared error by the channel's squared norm, and takes the pruned path as teacher where each row has a rate",
    (*(one.format(plain=1, mask="probability", samples="{samples}") for one in EPOCH), "allocation.teacher=dense"),
)
RELEASED = Setting(
    "released",
    "as the authors' program runs: each channel's squared error over the channel's squared norm, the pruned path as "
    "teacher where each row has a rate, the dense path where each linear has one, one epoch of whole sequences. The "
    "paper writes the plain squared error and the dense path. Not copied are the program's optimiser, tuned for each "
    "model, and its sigmoid, which keeps rates between 0.38 and 0.62",
    (*(one.format(plain=0, mask="count", samples="{samples}") for one in EPOCH), "allocation.teacher=pruned"),
    ("allocation.teacher=dense",),
)
DEFAULTS = Setting("defaults", "with besa's defaults")
SETTINGS = {setting.name: setting for setting in (PAPER, RELEASED, DEFAULTS)}
