"""All results, in the order they are made in: each is an experiment in a setting on a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from besa.errors import BesaError
from besa.studies.workspace import Conditions, Measures
from experiments import models
from experiments.batches import STUDIES, TINY
from experiments.experiment import Experiment, Options
from experiments.settings import Setting
from experiments.sizes import Sizes, sizes

NAMES = (
    "table1", "table6", "fig1a", "fig5", "fig3", "fig4", "table5", "table3", "table4", "table2", "fig1b",
    "front", "domains", "beyond",
)  # fmt: skip
TINY_TEXT = str(TINY / "heldout.txt")


@dataclass(frozen=True)
class Item:
    """A result to make.

    Attributes:
        experiment: what is made.
        setting: of BESA.
        model: one of `experiments.models`, or whatever besa takes as MODEL.
    """

    experiment: Experiment
    setting: Setting
    model: str

    @property
    def name(self) -> str:
        """Of its files: the experiment's, then the setting and the model where they are not its first."""
        parts = [self.experiment.name]
        if self.setting != self.experiment.settings[0]:
            parts.append(self.setting.name)
        if self.model in self.experiment.models[1:]:
            parts.append(self.model)
        return "-".join(parts)

    @property
    def module(self) -> str:
        """That has the experiment."""
        return self.experiment.module or self.experiment.name

    def sizes(self, preset: str) -> Sizes:
        """Of its runs."""
        given = sizes(preset, self.experiment.name, self.model)
        return given if self.experiment.tasks else replace(given, questions=0)

    def options(self, given: Sizes, data: Mapping[str, str], device: str = "cpu") -> Options:
        """What its cases are made from.

        Args:
            given: the sizes.
            data: files of test sets by name.
            device: that computes.
        """
        one = self.experiment
        return Options(
            Conditions(located(self.model), one.calibration, given.samples, given.seqlen, device, given.dtype),
            Measures(
                one.texts,
                {name: file for name, file in data.items() if name in one.texts},
                given.window,
                given.max_windows,
                one.tasks,
                given.questions if one.tasks else None,
            ),
            given.points or one.points,
            self.setting,
            one.sparsity,
        )


def items(model: str | None = None) -> list[Item]:
    """All results; where a model is given, on it in place of the models of each."""
    experiments = [import_module(f"experiments.{name}").EXPERIMENT for name in NAMES] + list(STUDIES)
    found = [Item(one, setting, model or one.models[0]) for one in experiments for setting in one.settings]
    if model is None:
        found += [
            Item(one, setting, other) for one in experiments for other in one.models[1:] for setting in one.settings
        ]
    return found


def chosen(names: Sequence[str], model: str | None = None) -> list[Item]:
    """Those of given names, where the name of an experiment stands for all its results; all where none is given.

    Raises:
        BesaError: there is no such result.
    """
    every = items(model)
    for name in names:
        if not any(name in (item.name, item.experiment.name) for item in every):
            listed = ", ".join(dict.fromkeys(item.experiment.name for item in every))
            raise BesaError(f"There is no result {name!r}: choose from {listed}, or one of their settings and models.")
    return [item for item in every if not names or {item.name, item.experiment.name} & set(names)]


def located(model: str) -> str:
    """What besa takes as MODEL; a model of `experiments.models` is where it would be made."""
    return str(models.folder(model)) if model in models.MODELS else model


def missing(model: str) -> bool:
    """Whether a model of `experiments.models` has to be made first."""
    return model in models.MODELS and not Path(located(model)).is_dir()
