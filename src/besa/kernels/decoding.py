"""One decoding step of an attention module, or of a block, for one sequence, in one call on the CPU (decoding.cpp).

For one token, torch's operators between linears cost more in calls than in arithmetic.

Shape suffixes: K KV heads, T tokens, D head dimension, R rotary dimension, I columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from besa.kernels import attention, build, norm
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
    """An attention module as a C structure."""

    _fields_ = [
        *((name, _Linear) for name in ("query", "key", "value", "out")),
        *((name, _Norm) for name in ("query_norm", "key_norm")),
        ("attend", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
        ("attention", Attention),
    ]


class _Block(ctypes.Structure):
    """A block as a C structure."""

    _fields_ = [
        ("attention", _Step),
        *((name, _Norm) for name in ("before_attention", "after_attention", "before_mlp", "after_mlp")),
        *((name, _Linear) for name in ("gate", "up", "down")),
        ("activation", ctypes.c_void_p),
        ("width", ctypes.c_int64),
    ]


class _Token(ctypes.Structure):
    """What a token has, as a C structure."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("cosines", "sines", "allowed")),
        *((name, ctypes.c_int64) for name in ("turned", "tokens")),
    ]


class Token:
    """The token that is decoded.

    Attributes:
        tokens: T, with this one.
        turned: rotary dimension R.
        given: the structure for C code.

    Args:
        angles: cosines and sines (1, 1, R ≤ D) of its position, contiguous; R is the rotary dimension.
        allowed_111T: a mask that `besa.kernels.attention.allows` accepts, or None.
        tokens: T.
    """

    def __init__(self, angles: tuple[Tensor, Tensor], allowed_111T: Tensor | None, tokens: int) -> None:
        self.tokens, self.turned = tokens, angles[0].size(2)
        self._angles, self._allowed_111T = angles, allowed_111T  # which must live
        self.given = _Token(
            angles[0].data_ptr(),
            angles[1].data_ptr(),
            None if allowed_111T is None else allowed_111T.data_ptr(),
            self.turned,
            tokens,
        )


class Place(NamedTuple):
    """Where a layer of a cache has its keys (1, K, T, D) and values; T and D are contiguous.

    Attributes:
        keys: address; there is room for those of the token that is decoded.
        values: likewise.
        key_head: stride of the heads, in elements.
        value_head: likewise.
    """

    keys: int
    values: int
    key_head: int
    value_head: int


def serves(dtype: torch.dtype) -> bool:
    """Whether there are kernels for a dtype on this machine."""
    return dtype in attention.DTYPES and load(SOURCE) is not None and bool(attention.paths()) and bool(norm.paths())


class Step:
    """A decoding step of one attention module; all that does not depend on the token is prepared once.

    Queries and keys get their norm and their rotary embedding (RoFormer; Su et al., 2021, arXiv 2104.09864), in the
    order of transformers' Llama. Then `besa.kernels.attention.attend` follows. What torch would round in between is
    rounded.

    Attributes:
        dtype: of all tensors.
        shapes: (1, 1, I) of the input, and (K, D) of keys and of values.
        out: length of the output.
        room: elements of scratch memory that a call needs.
        given: the structure for C code.

    Args:
        linears: of queries, keys, values and the output.
        norms: of queries and of keys, or None; over each head or over all heads, by the length of the weight.
        width: head dimension of queries and keys.
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
        value_width = value // shared
        fit = (heads * width, shared * width, shared * value_width, heads * value_width) == (query, key, value, read)
        if not fit or heads % shared or any(linear.shape[1] != columns for linear in linears[:3]):
            raise ValueError("the linears of an attention module do not fit together")
        self.dtype, self.shapes = dtype, ((1, 1, columns), (shared, width), (shared, value_width))
        self.room, self.out = query + key + value + heads * value_width, out
        self.given = _Step(*map(_linear, linears), *(_norm(each, dtype) for each in norms))
        self.given.attend, self.given.threads = address(attention.function(dtype)), torch.get_num_threads()
        self.given.attention = Attention(
            sequences=1,
            heads=heads,
            shared=shared,
            width=width,
            value_width=value_width,
            query_head=width,
            key_token=width,
            value_token=value_width,
            share=attention.SHARE,
            scale=scale,
        )
        self._function, self._tensors = _function("attend", dtype, 6), (linears, norms)  # which must live

    def __call__(self, x_11I: Tensor, token: Token, place: Place) -> Tensor:
        """The output (1, 1, I) for a token, whose key and value are written.

        Args:
            x_11I: input of the module, contiguous; it and the cache have the `shapes`.
            token: the last of those that are cached.
            place: in the cache.
        """
        room, y_11I = x_11I.new_empty(self.room), x_11I.new_empty(1, 1, self.out)
        places = (ctypes.c_int64 * 4)(*place)
        structures = map(ctypes.addressof, (self.given, token.given, places))
        self._function(*structures, x_11I.data_ptr(), room.data_ptr(), y_11I.data_ptr())
        return y_11I


class Block:
    """A decoding step of a whole block in bfloat16: attention, then the MLP, each with its norms and residual.

    Attributes:
        attention: its step.
        room: elements of scratch memory that a call needs.
        given: the structure for C code.

    Args:
        attention: its step.
        norms: before and after attention, before and after the MLP; or None.
        linears: gate, up and down of the MLP.
        activation: a table (65536,) of the activation for every bfloat16, by its bits.

    Raises:
        ValueError: the parts do not fit together.
    """

    def __init__(
        self, attention: Step, norms: Sequence[Norm | None], linears: Sequence[Linear], activation: Tensor
    ) -> None:
        (inner, columns), up, down = (linear.shape for linear in linears)
        widths = {norm.weight.numel() for norm in norms if norm is not None} | {columns, attention.out}
        fit = attention.shapes[0] == (1, 1, columns) and (up, down) == ((inner, columns), (columns, inner))
        if not fit or len(widths) > 1 or activation.shape != (1 << 16,):
            raise ValueError("the parts of a block do not fit together")
        self.attention, self._tensors = attention, (norms, linears, activation)  # which must live
        self.room = 2 * (columns + inner) + attention.room
        self.given = _Block(attention.given, *(_norm(each, torch.bfloat16) for each in norms), *map(_linear, linears))
        self.given.activation, self.given.width = activation.data_ptr(), columns


def passed(blocks: Sequence[Block], x_11I: Tensor, token: Token, places: Sequence[Place]) -> Tensor:
    """Outputs (blocks, 1, 1, I) of blocks that follow each other, for a token whose keys and values are written.

    Args:
        blocks: one or more, of one width.
        x_11I: input of the first one, contiguous.
        token: the last of those that are cached.
        places: in the cache, of each block.
    """
    y_B11I, room = x_11I.new_empty(len(blocks), *x_11I.shape), x_11I.new_empty(max(block.room for block in blocks))
    structures = (ctypes.c_void_p * len(blocks))(*(ctypes.addressof(block.given) for block in blocks))
    numbers = (ctypes.c_int64 * (4 * len(places)))(*chain.from_iterable(places))
    given = *map(ctypes.addressof, (token.given, numbers)), x_11I.data_ptr(), room.data_ptr(), y_B11I.data_ptr()
    _function("pass", torch.bfloat16, 7)(ctypes.addressof(structures), len(blocks), *given)
    return y_B11I


def _linear(linear: Linear) -> _Linear:
    kernel, weight, _ = linear.entry
    return _Linear(kernel, weight, None if linear.bias is None else linear.bias.data_ptr(), linear.shape[0])


def _norm(of: Norm | None, dtype: torch.dtype) -> _Norm:
    if of is None:
        return _Norm()
    return _Norm(address(norm.function(dtype)), of.weight.data_ptr(), of.weight.numel(), of.epsilon, *of.form)


@cache
def _function(work: str, dtype: torch.dtype, arguments: int) -> Callable[..., None]:
    name = f"{work}_{str(dtype).removeprefix('torch.')}"
    found: Callable[..., None] = build.function(SOURCE, name, [ctypes.c_int64] * arguments)
    return found
