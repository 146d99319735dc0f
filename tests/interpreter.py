"""What Triton's interpreter, which runs kernels on CPU tensors, lacks or does otherwise than a GPU.

It has no functions of CUDA's libdevice, multiplies the bits of bfloat16 as integers, and cuts off where a GPU rounds to
the nearest bfloat16.
"""

import numpy as np
import pytest
import torch


def repair(patch: pytest.MonkeyPatch) -> None:
    """Let the interpreter count bits, multiply bfloat16, and round to it."""
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def popc(word):
        counts = np.bitwise_count(word.handle.data.view(np.uint32)).astype(np.int32)
        return tl.tensor(TensorHandle(counts, tl.int32), word.type)

    def converted(data, before, after, rounding):
        if before == tl.float32 and after == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
            return rounded.view(torch.uint16).numpy()
        return plain_conversion(data, before, after, rounding)

    def dot(self, a, b, sums, precision, imprecise):
        return plain_dot(self, *(as_floats(factor) for factor in (a, b)), sums, precision, imprecise)

    def as_floats(factor):
        if factor.dtype != tl.bfloat16:
            return factor
        data = plain_conversion(factor.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return TensorHandle(data, tl.float32)

    plain_conversion, plain_dot = interpreter._convert_float, InterpreterBuilder.create_dot
    patch.setattr(libdevice, "popc", popc)
    patch.setattr(interpreter, "_convert_float", converted)
    patch.setattr(InterpreterBuilder, "create_dot", dot)
