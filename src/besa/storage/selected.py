"""Weight files of which a selection is read: tensors may be left out, read in part, or renamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from besa.storage.weights import WeightFiles


@dataclass(frozen=True)
class Selection:
    """What is read of a stored tensor.

    Attributes:
        name: of the stored tensor.
        axis: along which a part is taken; None for all of it.
        places: along the axis that are taken, in order.
    """

    name: str
    axis: int | None = None
    places: tuple[int, ...] = ()

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is read of a tensor of the shape `stored`."""
        if self.axis is None:
            return stored
        return (*stored[: self.axis], len(self.places), *stored[self.axis + 1 :])

    def of(self, stored: Tensor) -> Tensor:
        """What is read of the stored tensor."""
        if self.axis is None:
            return stored
        return stored.index_select(self.axis, torch.tensor(self.places, device=stored.device))


class SelectedFiles(WeightFiles):
    """The selected tensors of a folder; errors as of `WeightFiles`.

    Args:
        files: of the folder.
        selections: by the name under which the tensor is read.
    """

    def __init__(self, files: WeightFiles, selections: Mapping[str, Selection]) -> None:
        self.folder: Path = files.folder
        self.paths = files.paths
        self._files = files
        self._selections = dict(selections)

    @property
    def names(self) -> list[str]:
        """Names of all tensors of the selection."""
        return list(self._selections)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all tensors of the selection."""
        stored = dict(self._files.shapes())
        yield from ((name, part.shape(stored[part.name])) for name, part in self._selections.items())

    def dtypes(self) -> dict[str, str]:
        """Formats of all tensors of the selection by name, with their safetensors names."""
        stored = self._files.dtypes()
        return {name: stored[part.name] for name, part in self._selections.items()}

    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point tensor of the folder."""
        return self._files.dtype()

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read tensors one at a time, each whole, and select."""
        wanted = self._wanted(names)
        for stored, tensor in self._files.read(wanted):
            yield wanted[stored], self._selections[wanted[stored]].of(tensor)

    def read_to(self, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        """Read tensors to a device, each whole, and select there."""
        wanted = self._wanted(names)
        tensors = self._files.read_to(wanted, device)
        return {wanted[stored]: self._selections[wanted[stored]].of(tensor) for stored, tensor in tensors.items()}

    def mapped(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors mapped from their files, except those of which only a part is selected."""
        wanted = self._wanted(names)
        for stored, tensor in self._files.mapped(wanted):
            yield wanted[stored], self._selections[wanted[stored]].of(tensor)

    def prefetch(self, names: Iterable[str]) -> None:
        """Prefetch the stored tensors that these names select from."""
        self._files.prefetch(self._wanted(names))

    def _wanted(self, names: Iterable[str]) -> dict[str, str]:
        """Names in the selection by the name of the stored tensor; each is shown once."""
        return {self._selections[name].name: name for name in names}
