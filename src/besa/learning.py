"""The base of the parts of a recipe that learn step by step: how many sequences a step has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PlainValidator

from besa.settings import Settings


def _batch(value: Any) -> int | str:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value  # type: ignore[no-any-return]
    raise ValueError(f"batch is {value!r:.80} but must be a number of sequences from 1 on, or auto")


class Learning(Settings):
    """Base of parts that learn step by step.

    Attributes:
        most_shared: sequences of a step, at most, that several ranks share by default (docs/log.md).
    """

    most_shared: ClassVar[int] = 1
    batch: Annotated[int | Literal["auto"], PlainValidator(_batch)] = Field(
        default="auto",
        description="sequences of a learning step; auto: 1, or more where ranks share them",
    )

    @property
    def sequences(self) -> int:
        """Sequences of a step; one until `settled` has chosen another number."""
        return 1 if self.batch == "auto" else self.batch

    def settled(self, ranks: int, samples: int, begun: Mapping[str, Any]) -> Self:
        """A copy of the settings in which the number of sequences is chosen.

        Args:
            ranks: that share the sequences of a step.
            samples: sequences of the calibration set.
            begun: settings of the same part in a run that is resumed, if there is one: its number stays.
        """
        if self.batch != "auto":
            return self
        return self.model_copy(update={"batch": begun.get("batch", min(ranks, self.most_shared))})
