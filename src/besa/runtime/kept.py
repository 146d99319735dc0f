"""Objects made from a module and kept: decoding steps hold memory addresses, which are valid until the module changes.

A step is asked for each token, beside weights that leave nothing else in the processor's caches. So whether it still
holds is found in few calls, of functions that Python has in C.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import islice
from operator import attrgetter, is_
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

Made = TypeVar("Made")
PRODUCT = "_product"  # of a packed linear, which forgets it when its numbers change
OWN = ("forward", "training", "act_fn")  # attributes that change what any other module does, beside parts and numbers
_function = attrgetter("forward")
_functions: dict[type[nn.Module], Any] = {}  # of classes, as they were when a module of each was first tried


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 for tensors of inference mode, which nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


def untouched(kind: type[nn.Module]) -> bool:
    """Whether a class still has the `forward` with which one of its modules was tried; some libraries replace it."""
    return _functions.setdefault(kind, _function(kind)) is _function(kind)


class Kept(Generic[Made]):
    """An object made from a module, and made again when the module has changed.

    Args:
        module: with all that it contains.
        make: makes the object from keys; returns None if it cannot.
    """

    def __init__(self, module: nn.Module, make: Callable[..., Made | None]) -> None:
        self._module, self._make = module, make
        self._made: Made | None = None
        self._as: _Unchanged | None = None
        self._keys: tuple[Hashable, ...] = ()
        self._hooked = False

    def now(self, *keys: Hashable) -> Made | None:
        """The object for the module as it is now; None if it cannot be made, a part has a hook, or a class was changed.

        Args:
            keys: what the object depends on besides the module.
        """
        as_made = self._as
        if as_made is None or keys != self._keys or as_made.hooked() != self._hooked or not as_made.holds():
            self._made = self._make(*keys)
            self._as, self._keys = _Unchanged(self._module), keys  # after that, as it may have made parts ready
            self._hooked = self._as.hooked()
        return None if self._hooked else self._made

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles, without memory addresses."""
        return {**self.__dict__, "_made": None, "_as": None}


class _Unchanged:
    """A module as it is now: its parts and theirs, their tensors and where these are, numbers, and functions.

    Of a packed linear, only one tensor is asked where it is, as these are most of all: who moves the memory of one, as
    for another process, moves that of all. Hooks of the module itself are not looked at: its own call sees to them.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = [*module.modules()]
        self._hooks = [hooks for each in modules[1:] for hooks in (each._forward_hooks, each._forward_pre_hooks)]
        self._parts: list[dict[str, Any]] = []
        places: list[tuple[dict[str, Any], str]] = []
        tensors: list[Tensor | None] = []
        self._memory: list[Tensor] = []  # of what may move unnoticed: it must live
        self._copied: list[Tensor] = []  # numbers that a product has a copy of
        for each in modules:
            packed = PRODUCT in vars(each)
            parts = each._modules, each._parameters, each._buffers
            self._parts += parts
            places += [(table, name) for table in parts for name in table]
            places += [(vars(each), name) for name in (("forward", PRODUCT) if packed else OWN)]
            places += [(vars(each), name) for name, value in vars(each).items() if isinstance(value, float)]
            tensors += (*each._parameters.values(), *islice(each._buffers.values(), 1 if packed else None))
            numbers = [buffer.detach() for buffer in each._buffers.values() if packed and buffer is not None]
            self._memory += numbers
            self._copied += numbers if packed and getattr(vars(each)[PRODUCT], "prepacked", False) else ()
        self._versions = [*map(version, self._copied)]
        self._sizes = [*map(len, self._parts)]
        self._tables, self._names = [table for table, _ in places], [name for _, name in places]
        self._objects = [*map(dict.get, self._tables, self._names)]
        self._tensors = [each for each in tensors if each is not None]
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]
        self._kinds = [*{type(each) for each in modules}]
        self._tried = [_functions.setdefault(kind, _function(kind)) for kind in self._kinds]

    def hooked(self) -> bool:
        """Whether a part has hooks, or its class has another `forward` now."""
        return any(self._hooks) or not all(map(is_, map(_function, self._kinds), self._tried))

    def holds(self) -> bool:
        """Whether everything is the same."""
        return (
            all(map(is_, map(dict.get, self._tables, self._names), self._objects))
            and [*map(len, self._parts)] == self._sizes
            and [*map(Tensor.data_ptr, self._tensors)] == self._addresses
            and [*map(version, self._copied)] == self._versions
        )
