"""What an attention module does for one new token of one sequence, in one call on the CPU (decoding.cpp).

For one token, the calls of torch between a module's linears cost more than their arithmetic.

Shape suffixes: K heads of keys and values, T tokens, D numbers of a head, R those that are turned, I columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from besa.kernels import attention, norm
from besa.kernels.attention import Attention
from besa.kernels.build import load
from besa.kernels.sparse_native import Entry, address

SOURCE = "decoding.cpp"


class Linear(NamedTuple):
    """y = W x + b.

    Attributes:
        entry: of the product with W.
        bias: b, contiguous, or None.
        shape: of W.
    """

    entry: Entry
    bias: Tensor | None
    shape: tuple[int, int]


class Norm(NamedTuple):
    """A norm of queries or keys; fields as of `besa.kernels.norm.normed`."""

    weight: Tensor
    epsilon: float
    form: norm.Form


class _Linear(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("multiply", "weight", "bias")), ("rows", ctypes.c_int64)]


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("normed", "weight")),
        ("width", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("epsilon", "more")),
        ("rounded", ctypes.c_int64),
    ]


class _Step(ctypes.Structure):
    """The arguments as a C structure for the kernel."""

    _fields_ = [
        *((name, _Linear) for name in ("query", "key", "value", "out")),
        *((name, _Norm) for name in ("query_norm", "key_norm")),
        *((name, ctypes.c_void_p) for name in ("x", "cosines", "sines", "new_key", "new_value", "keys", "values", "y")),
        *((name, ctypes.c_int64) for name in ("turned", "threads")),
        ("attend", ctypes.c_void_p),
        ("attention_threads", ctypes.c_int64),
        ("attention", Attention),
    ]


def serves(dtype: torch.dtype) -> bool:
    """Whether there are kernels for a dtype on this machine."""
    return dtype in attention.DTYPES and load(SOURCE) is not None and bool(attention.paths()) and bool(norm.paths())


class Step:
    """A step of one attention module, with all made ready that does not depend on the token.

    Queries and keys get their norm and their rotary embedding (RoFormer, arXiv:2104.09864, in the order of
    transformers' Llama), then `besa.kernels.attention.attend` follows. What torch would round in between is rounded.

    Attributes:
        shapes: (1, 1, I) of the input, and K and D of keys and of values.

    Args:
        linears: of queries, keys, values and the output; what they are made of must live.
        norms: of queries and of keys, of each head or of all together, as long as their weight is; or None.
        width: D of queries and keys.
        scale: of the scores.
        dtype: that `serves` allows, of all tensors.

    Raises:
        ValueError: the linears do not fit together.
    """

    def __init__(
        self, linears: Sequence[Linear], norms: Sequence[Norm | None], width: int, scale: float, dtype: torch.dtype
    ) -> None:
        (query, columns), (key, _), (value, _), (out, read) = (linear.shape for linear in linears)
        heads, shared = query // width, key // width
        value_width, self._size = value // shared, dtype.itemsize
        fit = (heads * width, shared * width, shared * value_width, heads * value_width) == (query, key, value, read)
        if not fit or heads % shared or any(linear.shape[1] != columns for linear in linears[:3]):
            raise ValueError("the linears of an attention module do not fit together")
        self.shapes = (1, 1, columns), (shared, width), (shared, value_width)
        self._room, self._out = query + key + value + heads * value_width, out
        self._parts = [self._size * end for end in (query, query + key, query + key + value)]
        given = _Step(*map(_linear, linears), *(_norm(each, dtype) for each in norms))
        given.threads, given.attend = torch.get_num_threads(), address(attention.function(dtype))
        given.attention = Attention(
            sequences=1, heads=heads, shared=shared, width=width, value_width=value_width, query_head=width, scale=scale
        )
        self._given, self._function = bytes(given), _function(dtype)

    def __call__(
        self,
        x_11I: Tensor,
        angles: tuple[Tensor, Tensor],
        keys_1KTD: Tensor,
        values_1KTD: Tensor,
        allowed_111T: Tensor | None,
    ) -> Tensor:
        """The output (1, 1, I) for the last of T tokens, whose key and value are written.

        Args:
            x_11I: input of the module, contiguous; it and the cache have the `shapes`.
            angles: cosines and sines (1, 1, R ≤ D) of the token's position, contiguous, by which R of a head turn.
            keys_1KTD: of all tokens, with room for those of the last one. D follow each other, and T do.
            values_1KTD: as of the keys.
            allowed_111T: as `besa.kernels.attention.allows` it.
        """
        room, y_11I = x_11I.new_empty(self._room), x_11I.new_empty(1, 1, self._out)
        given, place, last = _Step.from_buffer_copy(self._given), room.data_ptr(), keys_1KTD.size(2) - 1
        keys, values = keys_1KTD.data_ptr(), values_1KTD.data_ptr()
        of = given.attention
        given.x, given.y = x_11I.data_ptr(), y_11I.data_ptr()
        given.cosines, given.sines, given.turned = angles[0].data_ptr(), angles[1].data_ptr(), angles[0].size(2)
        given.new_key = keys + self._size * last * of.width
        given.new_value = values + self._size * last * of.value_width
        of.query = place
        given.keys, given.values, of.out = (place + part for part in self._parts)
        of.keys, of.values, of.tokens = keys, values, last + 1
        of.allowed = None if allowed_111T is None else allowed_111T.data_ptr()
        of.key_head, of.key_token = keys_1KTD.stride(1), of.width
        of.value_head, of.value_token = values_1KTD.stride(1), of.value_width
        given.attention_threads = attention.threads(of)
        self._function(ctypes.addressof(given))
        return y_11I


def _linear(linear: Linear) -> _Linear:
    return _Linear(*linear.entry, None if linear.bias is None else linear.bias.data_ptr(), linear.shape[0])


def _norm(of: Norm | None, dtype: torch.dtype) -> _Norm:
    if of is None:
        return _Norm()
    return _Norm(address(norm.function(dtype)), of.weight.data_ptr(), of.weight.numel(), of.epsilon, *of.form)


@cache
def _function(dtype: torch.dtype) -> Callable[[int], None]:
    kernels = load(SOURCE)
    assert kernels is not None
    function = kernels[f"decode_{str(dtype).removeprefix('torch.')}"]
    function.argtypes, function.restype = [ctypes.c_void_p], None
    return function
