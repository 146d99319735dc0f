"""What distilling asks of the place that keeps its states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor


class Snapshots(Protocol):
    """Where the states of the work are kept, so that a killed run goes on from the last."""

    @property
    def position(self) -> dict[str, Any] | None:
        """Position of the last state, in JSON types; None if there is none."""

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Tensors of a group in the last state."""

    def keep(
        self, position: Mapping[str, Any], groups: Iterable[tuple[str, Mapping[str, Tensor]]], urgent: bool
    ) -> None:
        """Keep a state, if it is urgent or some time has passed since the last one.

        Args:
            position: in the work, in JSON types.
            groups: tensors by name of each group; one group at a time is in memory.
            urgent: keep it now.
        """
