"""The arguments that a model calls its blocks with: named, kept, compared, and passed again.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

import inspect
from collections import UserDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from besa.errors import BesaError

PLAIN = (type(None), bool, int, float, complex, str, bytes, slice, torch.dtype, torch.device)


class ElsewhereError(LookupError):
    """A block looks in a mapping for an entry that another block left there."""


class Unknown:
    """Stands for an output, beside the hidden states, of a block that stands aside."""


class Apart(UserDict[Any, Any]):
    """A mapping that blocks share, as seen by one block run alone: it has this block's entries and no others."""

    def __missing__(self, key: Any) -> Any:
        raise ElsewhereError(key)

    def __contains__(self, key: object) -> bool:
        if key not in self.data:
            raise ElsewhereError(key)
        return True


def named(module: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The hidden states of a call, which are its first parameter, and all other arguments by name.

    Args:
        module: that is called.
        inputs: positional arguments.
        keywords: keyword arguments.

    Raises:
        BesaError: the module's forward takes arguments without names.
    """
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    if not names or len(inputs) > len(names):
        raise BesaError(
            f"{type(module).__name__} takes arguments without names (*args): besa cannot call it as its model does."
        )
    arguments = dict(zip(names, inputs, strict=False)) | dict(keywords)
    return arguments.pop(names[0]), arguments


def hidden_states_of(output: Any) -> Tensor:
    """The hidden states (N, T, C) in the output of a block: the output itself, or the first of several."""
    y_NTC: Tensor = output if isinstance(output, Tensor) else output[0]
    return y_NTC


def moved(value: Any, device: torch.device) -> Any:
    """An argument on a device; lists and mappings are changed in place."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return _like(value, [moved(item, device) for item in value])
    if isinstance(value, list):
        value[:] = [moved(item, device) for item in value]
    if isinstance(value, dict | UserDict):
        value.update({key: moved(item, device) for key, item in value.items()})
    return value


def replayed(value: Any, device: torch.device) -> Any:
    """An argument on a device, for one more call; lists and mappings are copied, so that calls share no changes."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return _like(value, [replayed(item, device) for item in value])
    if isinstance(value, list):
        return [replayed(item, device) for item in value]
    if _is_shared(value):
        return Apart({key: replayed(item, device) for key, item in value.items()})
    if isinstance(value, dict):
        return {key: replayed(item, device) for key, item in value.items()}
    return value


def _like(value: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    """A tuple of the same class, which may be a named tuple."""
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def _is_shared(value: Any) -> bool:
    """Whether blocks may pass values to each other in it: a mapping of another class than dict, or an empty one."""
    return isinstance(value, UserDict) or (isinstance(value, dict) and not value)


def shares(value: Any) -> bool:
    """Whether an argument contains a mapping in which blocks may pass values to each other."""
    return any(_is_shared(part) for part in parts(value))


def parts(value: Any) -> Iterator[Any]:
    """An argument and everything nested in it."""
    yield value
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for item in inner:
        yield from parts(item)


def changeable(value: Any) -> Any:
    """The first part of an argument that may change between calls, such as a cache; None if there is none."""
    constant = (*PLAIN, Tensor, tuple, dict, UserDict)
    for part in parts(value):
        if not isinstance(part, constant) and not (isinstance(part, list) and part):
            return part
    return None


class Sameness:
    """Compares arguments bit for bit. Two tensors are compared once, as the host waits for their device each time."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], bool] = {}
        self._alive: list[Tensor] = []  # so that no other tensor gets their memory

    def __call__(self, one: Any, other: Any) -> bool:
        """Whether two arguments are equal."""
        if isinstance(one, Tensor):
            return isinstance(other, Tensor) and self._of_tensors(one, other)
        if isinstance(one, Mapping):
            alike = isinstance(other, Mapping) and one.keys() == other.keys()
            return alike and all(self(value, other[key]) for key, value in one.items())
        if isinstance(one, list | tuple):
            alike = isinstance(other, list | tuple) and len(one) == len(other)
            return alike and all(self(*pair) for pair in zip(one, other, strict=True))
        return bool(one == other)

    def _of_tensors(self, one: Tensor, other: Tensor) -> bool:
        key, other_key = ((x.data_ptr(), x.shape, x.stride(), x.dtype) for x in (one, other))
        if key == other_key:  # one tensor, in the same memory
            return True
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return False
        if (key, other_key) not in self._known:
            self._alive += [one, other]
            self._known[key, other_key] = bool(((one == other) | ((one != one) & (other != other))).all())
        return self._known[key, other_key]


def versions(value: Any) -> list[int]:
    """How often each tensor of an argument has been written to."""
    return [part._version for part in parts(value) if isinstance(part, Tensor)]
