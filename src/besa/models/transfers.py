"""Tensors on their way between host and device, while the device computes.

On CUDA and XPU, copies in either direction go by streams of their own. What the device computes next waits for what it
reads; memory is not used again before the copy that needs it is done. On any other device, a copy is done when the line
that asks for it is.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future
from functools import cache
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from besa.models.activations import HiddenStates
from besa.storage.beside import Beside
from besa.system.devices import available_bytes, has_streams, synchronize

# Times the size of a block: as much as the costliest recipes need for it, beside the next one (`besa plan`).
NEEDED = 24
Key = TypeVar("Key", bound=Hashable)
Lane = Literal["states in", "states out", "weights"]


@cache
def lane(device: torch.device, name: Lane) -> Any:
    """The stream of that name beside the one that computes; None on devices without such streams."""
    return torch.get_device_module(device).Stream(device) if has_streams(device) else None


def fetched(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, for the stream that computes there; the tensor itself if it is there already.

    Args:
        tensor: anywhere. The host waits for the copy, though not for what is computed, unless it is in pinned memory.
        device: where it is needed.
    """
    stream = lane(device, "states in")
    if stream is None or tensor.device.type != "cpu":
        return tensor.to(device)
    with torch.get_device_module(device).stream(stream):
        there = tensor.to(device, non_blocking=tensor.is_pinned())
    _hand_over([there], device, stream)
    return there


def _hand_over(tensors: Iterable[Tensor], device: torch.device, stream: Any) -> None:
    """Let the stream that computes wait for tensors that another stream makes, and keep them until it has used them."""
    present = torch.get_device_module(device).current_stream(device)
    present.wait_stream(stream)
    for tensor in tensors:
        tensor.record_stream(present)


class Outputs:
    """Where the outputs of a pass over all sequences go, batch by batch.

    Args:
        into: receives them.
        device: that computes them.
    """

    def __init__(self, into: HiddenStates, device: torch.device) -> None:
        self._into = into
        self._device = device
        on_device = isinstance(into, Tensor) and into.device == device
        self._stream = None if on_device else lane(device, "states out")
        self._landing: tuple[slice, Tensor, Any] | None = None  # in pinned memory, on the way to a file

    def put(self, part: slice, y_NTC: Tensor) -> None:
        """Send the outputs of some sequences; the host does not wait for them."""
        if self._stream is None:
            self._into[part] = y_NTC
            return
        module = torch.get_device_module(self._device)
        self._stream.wait_stream(module.current_stream(self._device))
        with module.stream(self._stream):
            if isinstance(self._into, Tensor):
                self._into[part].copy_(y_NTC, non_blocking=True)
            else:
                landed = self._landing
                self._landing = (part, y_NTC.to("cpu", non_blocking=True), self._stream.record_event())
                _land(landed, self._into)
        y_NTC.record_stream(self._stream)

    def finish(self) -> None:
        """Wait until all have arrived."""
        if self._stream is not None:
            _land(self._landing, self._into)
            self._landing = None
            self._stream.synchronize()


def _land(landing: tuple[slice, Tensor, Any] | None, into: HiddenStates) -> None:
    if landing is not None:
        part, y_NTC, arrived = landing
        arrived.synchronize()
        into[part] = y_NTC


def at_home(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in memory of the host, by name; copies of those that are on a device, for which it waits once."""
    home = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
    for device in {tensor.device for tensor in tensors.values()}:
        synchronize(device)
    return home


class Ahead(Generic[Key]):
    """Weights on their way to a device before they are needed: read by a thread, copied by a stream of its own."""

    def __init__(self) -> None:
        self._thread = Beside()
        self._coming: dict[str, Future[dict[Key, Tensor]]] = {}

    def begin(self, name: str, device: torch.device, size: int, read: Callable[[], dict[Key, Tensor]]) -> None:
        """Begin to read weights, if the device has streams and room beside what the present block will need.

        Args:
            name: of the whole.
            device: where `read` puts them.
            size: bytes of them.
            read: gives them by a name of each.
        """
        stream = lane(device, "weights")
        if stream is None or NEEDED * size > available_bytes(device):
            return

        def work() -> dict[Key, Tensor]:
            with torch.get_device_module(device).stream(stream):
                return read()

        self._coming[name] = self._thread.submit(work)

    def take(self, name: str, device: torch.device) -> dict[Key, Tensor] | None:
        """The weights whose reading was begun under that name, ready to be used; None if it was not, or had no room.

        Raises:
            BesaError: as `read`.
        """
        if name not in self._coming:
            return None
        try:
            tensors = self._coming.pop(name).result()
        except torch.OutOfMemoryError:
            return None
        _hand_over(tensors.values(), device, lane(device, "weights"))
        return tensors
