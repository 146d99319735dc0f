"""The interface of targets that are measured on the dense model, before anything is pruned."""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

from besa.methods.survey import Survey
from besa.methods.targets.targeting import Targeting


class Measuring(Targeting):
    """Base of all targets for which each block is measured."""

    @property
    def measuring(self) -> Self:
        """The method itself."""
        return self

    @abstractmethod
    def every(self, samples: int) -> int:
        """One calibration sequence in so many is measured."""

    @abstractmethod
    def measure(self, survey: Survey) -> list[float]:
        """A number for each block, measured on the dense model; `targets` makes targets of them.

        Args:
            survey: the model.

        Raises:
            BesaError: there are too few sequences.
        """

    @abstractmethod
    def targets(self, measured: list[float], sizes: list[int], sparsity: float) -> list[float]:
        """The target of each block, made of what was measured: its sparsity, or what else the allocation asks for.

        Args:
            measured: as `measure` returned it.
            sizes: weights of each block.
            sparsity: of all blocks together.
        """
