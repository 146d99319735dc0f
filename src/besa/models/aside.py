"""Blocks that stand aside: each records its call and passes its input on, so that a model runs without them.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from besa.models.blocks import Block
from besa.models.calls import Unknown, named


@dataclass(frozen=True)
class Call:
    """A call of a block by its model while blocks stand aside.

    Attributes:
        block: that was called.
        x_NTC: hidden states.
        arguments: all others.
        y_NTC: what was returned.
    """

    block: Block
    x_NTC: Tensor
    arguments: dict[str, Any]
    y_NTC: Tensor


@contextmanager
def standing_aside(blocks: list[Block], factors: Sequence[float] = ()) -> Iterator[list[Call]]:
    """While open, blocks return their input and keep their arguments; yields the list of their calls, which grows.

    Args:
        blocks: that stand aside.
        factors: one for each block, by which it multiplies its input.
    """
    calls: list[Call] = []
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_standing_aside(block, calls, factors[block.index] if factors else 1))
        yield calls


class Passed(Tensor):
    """The output of a block that stands aside: its input, which also serves as the first value of a tuple."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl  # results of computations are plain tensors

    def __getitem__(self, index: Any) -> Any:
        whole = self.as_subclass(Tensor)
        if isinstance(index, int):
            return whole if index == 0 else Unknown()
        return whole[index]

    def __iter__(self) -> Iterator[Any]:
        """Give as many values as the model unpacks; the input is the first."""
        whole, frame = self.as_subclass(Tensor), sys._getframe(1)
        operation, number = frame.f_code.co_code[frame.f_lasti : frame.f_lasti + 2]
        if dis.opname[operation] not in ("UNPACK_SEQUENCE", "UNPACK_EX"):
            return iter(whole)
        return iter([whole, *(Unknown() for _ in range(1, number))])


@contextmanager
def _standing_aside(block: Block, calls: list[Call], factor: float) -> Iterator[None]:
    """While open, calls of the block return their input times a factor and store their arguments in the block."""

    def pass_on(*inputs: Any, **keywords: Any) -> Any:
        x_NTC, arguments = named(block.module, inputs, keywords)
        y_NTC = x_NTC if factor == 1 else x_NTC * factor
        calls.append(Call(block, x_NTC, arguments, y_NTC))
        block.arguments[x_NTC.shape[0], x_NTC.shape[1]] = arguments
        return y_NTC.as_subclass(Passed)

    before = vars(block.module).get("forward")  # accelerate sets its own
    block.module.forward = pass_on
    try:
        yield
    finally:
        del block.module.forward  # the class's own forward shows again
        if before is not None:
            block.module.forward = before
