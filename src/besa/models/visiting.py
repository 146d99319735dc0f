"""Modules that visit a device: their tensors go there once, and those that changed come back once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from besa.models.transfers import at_home


@dataclass
class _Place:
    """A place in a module for a parameter or a buffer.

    Attributes:
        tensors: the parameters or the buffers of the module.
        name: of the tensor among them.
        home: what was there before the visit; the same object is there again after it.
        guest: what is there during the visit.
        version: how often the guest had been written to when it was equal to `home`.
    """

    tensors: dict[str, Tensor | None]
    name: str
    home: Tensor
    guest: Tensor
    version: int

    @property
    def changed(self) -> Tensor | None:
        """What is there now, if it differs from `home`."""
        present = self.tensors[self.name]
        return None if present is self.guest and present._version == self.version else present


class Visit:
    """Parameters and buffers on a device, in the places of those elsewhere.

    Args:
        modules: their own tensors go, not those of modules inside them.
        device: where they go. Tensors that are there, and those on the meta device, stay.
        ready: tensors that are on the device already, by the id of the tensor that they are a copy of.
    """

    def __init__(
        self, modules: Iterable[nn.Module], device: torch.device, ready: Mapping[int, Tensor] | None = None
    ) -> None:
        self._places: list[_Place] = []
        guests: dict[int, Tensor] = {}  # tied tensors stay tied
        try:
            for tensors, name, home in _elsewhere(modules, device):
                if id(home) not in guests:
                    there = (ready or {}).get(id(home), home.detach()).to(device)
                    is_parameter = isinstance(home, nn.Parameter)
                    guests[id(home)] = nn.Parameter(there, requires_grad=home.requires_grad) if is_parameter else there
                guest = tensors[name] = guests[id(home)]
                self._places.append(_Place(tensors, name, home, guest, guest._version))
        except BaseException:  # the device's memory ran out, or Ctrl-C: what was moved so far goes back
            self.end()
            raise

    @torch.no_grad()
    def end(self) -> None:
        """Write what changed into the tensors of before, which take their places again."""
        changed = {str(number): place.changed for number, place in enumerate(self._places)}
        back = at_home({number: tensor for number, tensor in changed.items() if tensor is not None})
        for number, place in enumerate(self._places):
            if str(number) in back:
                place.home.copy_(back[str(number)])
            place.tensors[place.name] = place.home
        self._places.clear()


@contextmanager
def visiting(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """While open, the modules' own tensors are on a device; see `Visit`."""
    visit = Visit(modules, device)
    try:
        yield
    finally:
        visit.end()


def copies(modules: Iterable[nn.Module], device: torch.device) -> dict[int, Tensor]:
    """Copies on a device of tensors that are elsewhere, by the id of these: `ready` for a `Visit`."""
    return {id(home): home.detach().to(device) for _, _, home in _elsewhere(modules, device)}


def _elsewhere(
    modules: Iterable[nn.Module], device: torch.device
) -> Iterator[tuple[dict[str, Tensor | None], str, Tensor]]:
    """The tensors of modules that are neither on a device nor on the meta device, and their places."""
    for module in modules:
        places: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in places:
            for name, tensor in tensors.items():
                if tensor is not None and not tensor.is_meta and tensor.device != device:
                    yield tensors, name, tensor
