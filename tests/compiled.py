"""Every Triton kernel as machine code for GPUs that need not be there.

    python -m tests.compiled    # JSON: what each kernel takes on each architecture

The launch code itself runs, on tensors without memory. A driver that only names an architecture takes the place of
CUDA's, and kernels are compiled, as a GPU would ask for them, instead of started. Triton's wheel brings the compiler
and the assembler. Triton's interpreter, under which the other tests run, accepts what the compiler refuses.

A new kernel joins by a function in `CASES` that starts it with the shapes of real models and with odd ones.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from besa.counting.precision import dtype_name
from besa.storage.formats.bitmask import CHUNKS, Bitmask

WIDTHS = (576, 1536, 4096, 11008, 8192, 28672, 1, 37, 577, 4099)  # of SmolLM2, LLaMA-2-7B and 70B, and odd ones
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes on one architecture.

    Attributes:
        kernel: its name.
        architecture: 90 for sm_90.
        arguments: types of its arguments; constants by value, and a D where a value is divisible by 16.
        warps: of a program.
        registers: of a thread.
        spilled: bytes of a thread that its registers do not hold.
        shared: bytes of shared memory of a program.
    """

    kernel: str
    architecture: int
    arguments: str
    warps: int
    registers: int
    spilled: int
    shared: int


def masks() -> None:
    """Start the kernels of `gpu.masks`."""
    from besa.kernels.gpu.masks import binned, gathered, masked, spread

    every = [(columns, torch.bfloat16, torch.int16, 101) for columns in WIDTHS]
    every += [(4096, dtype, ranks, 101) for dtype in DTYPES for ranks in (torch.int16, torch.int32)]
    every += [(4096, torch.bfloat16, torch.int16, bins) for bins in (2, 11, 1001)]
    for columns, dtype, ranks, bins in every:
        w_OI, ranks_OI = empty(3, columns, dtype=dtype), empty(3, columns, dtype=ranks)
        masked(w_OI, ranks_OI, empty(3, dtype=torch.int64), w_OI)
        binned(w_OI, w_OI, ranks_OI, empty(columns, dtype=torch.int16), empty(3, bins))
    for columns, dtype in [*((columns, torch.bfloat16) for columns in WIDTHS), *((4096, dtype) for dtype in DTYPES)]:
        w_OI, kept_K = empty(3, columns, dtype=dtype), empty(columns)
        spread(w_OI, kept_K, w_OI)
        gathered(w_OI, w_OI, kept_K)


def sparse() -> None:
    """Start the kernels of `gpu.sparse`, for one row of x and for several."""
    from besa.kernels.gpu.sparse import multiply, unpack

    floats = [("bfloat16", 577), ("bfloat16", 28672), ("float16", 11008), ("float32", 4096)]
    weights = [bitmask(columns, getattr(torch, dtype)) for dtype, columns in floats]
    weights += [bitmask(4096, dtype, bits=4, groups=32) for dtype in (torch.bfloat16, torch.float32)]
    weights += [bitmask(60, torch.bfloat16, bits=3, groups=5), bitmask(11008, torch.bfloat16, bits=8)]
    for weight in weights:
        unpack(weight)
        for batch in (1, 8):
            multiply(empty(batch, weight.shape[1], dtype=weight.dtype), weight)


def bitmask(columns: int, dtype: torch.dtype, bits: int | None = None, groups: int = 1) -> Bitmask:
    """A sparse weight without memory: of floats, or of codes, which are symmetric if a row is one group."""
    kind = dtype_name(dtype) if bits is None else "int4" if bits <= 4 else "int8"
    length, word = CHUNKS[kind]
    masks_BCR = empty(10, -(-columns // length), 4, dtype=word)
    offsets = empty(11, dtype=torch.int64)
    if bits is None:
        return Bitmask((38, columns), masks_BCR, empty(99, dtype=dtype), offsets)
    scales_OG = empty(38, groups, dtype=dtype)
    zeros_OG = empty(38, groups, dtype=torch.uint8) if groups > 1 else None
    return Bitmask((38, columns), masks_BCR, empty(99, dtype=torch.uint8), offsets, scales_OG, zeros_OG, bits)


def rates() -> None:
    """Start the kernels of `gpu.rates`."""
    from besa.kernels.gpu.rates import pruned_ranks

    for groups in (7, 42_496):  # linears of a block, rows of a block of 7B
        alpha_R, width_R = empty(groups), empty(groups, dtype=torch.float64)
        pruned_ranks(alpha_R, width_R, alpha_R, 0.5)


def apportioning() -> None:
    """Start the kernel of `gpu.apportioning`."""
    from besa.kernels.gpu.apportioning import cheapest_counts

    for rows in (3, 83_968):  # of a block of 70B
        ideal_R = empty(rows, dtype=torch.float64)
        cheapest_counts(ideal_R, ideal_R, ideal_R, rows)


def clipping() -> None:
    """Start the kernels of `gpu.clipping`."""
    from besa.kernels.gpu.clipping import clipping_gradient, quantized

    every = [(columns, 1, torch.bfloat16, 4, False) for columns in WIDTHS]
    every += [(4096, 1, dtype, 4, symmetric) for dtype in DTYPES for symmetric in (False, True)]
    every += [(4096, 4096 // size, torch.bfloat16, 4, False) for size in (32, 64, 128)]
    every += [(4096, 1, torch.bfloat16, bits, True) for bits in (2, 8)]
    for columns, groups, dtype, bits, symmetric in every:
        w_OI, logits_2OG, low_OG = empty(3, columns, dtype=dtype), empty(2, 3, groups), empty(3, groups)
        quantized(w_OI, logits_2OG, low_OG, low_OG, bits, symmetric, w_OI)
        clipping_gradient(w_OI, w_OI, logits_2OG, low_OG, low_OG, bits, symmetric)


def sweep() -> None:
    """Start the kernels of `gpu.sweep`."""
    from besa.kernels.gpu.sweep import WIDEST, swept

    for width in WIDTHS:
        for columns in (1, 4, 128, 100, 1024, WIDEST):
            w_OI, kept_OI = empty(3, width), empty(3, width, dtype=torch.bool)
            if columns <= width:
                block_OB, kept_OB = w_OI[:, -columns:], kept_OI[:, -columns:]
                swept(block_OB, kept_OB, empty(width, width)[-columns:, -columns:], empty(3, columns))
        turned_OB = empty(128, 3).T
        swept(turned_OB, turned_OB > 0, empty(128, 128).T, empty(128, 3).T)


def statistics() -> None:
    """Start the kernels of `gpu.statistics`."""
    from besa.kernels.gpu.statistics import add_squares, histogram

    for channels, dtype in [*((width, torch.bfloat16) for width in WIDTHS), *((4096, dtype) for dtype in DTYPES)]:
        add_squares(empty(300, channels, dtype=dtype), empty(channels, dtype=torch.float64))
    for dtype in (torch.int16, torch.int32, torch.int64):
        histogram(empty(8192, 28_673, dtype=dtype), 1 << 16)


CASES: list[Callable[[], None]] = [masks, rates, apportioning, clipping, sweep, statistics, sparse]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


class Compiler:
    """Takes the place of CUDA's driver, and compiles what is launched.

    Args:
        architectures: to compile for, such as 90.

    Attributes:
        found: what was compiled, each once.
    """

    def __init__(self, architectures: Iterable[int]) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver, jit

        self.found: list[Compiled] = []
        self._architectures, self._architecture = list(architectures), 0
        self._seen: set[str] = set()
        driver.set_active(
            SimpleNamespace(
                get_current_device=lambda: self._architecture,  # one device of each architecture
                get_current_stream=lambda device: 0,
                get_current_target=lambda: GPUTarget("cuda", self._architecture, 32),
            )
        )
        run = jit.JITFunction.run
        jit.JITFunction.run = lambda kernel, *arguments, grid, warmup, **constants: self._add(
            kernel, run(kernel, *arguments, grid=grid, warmup=True, **constants)
        )

    def compile(self, case: Callable[[], None]) -> None:
        """Compile every kernel that a case starts, for each architecture."""
        for architecture in self._architectures:
            self._architecture = architecture
            case()

    def _add(self, kernel: Any, compiled: Any) -> None:
        if compiled.hash in self._seen:
            return
        self._seen.add(compiled.hash)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", _cuobjdump("-res-usage", file.name))
        assert used is not None
        registers, stack, shared, local = map(int, used.groups())
        self.found.append(
            Compiled(
                kernel.fn.__name__.lstrip("_"),
                self._architecture,
                _described(compiled.src),
                compiled.metadata.num_warps,
                registers,
                stack + local,
                max(shared, compiled.metadata.shared),
            )
        )


def _described(source: Any) -> str:
    values = {path[0]: value for path, value in source.constants.items()}
    divisible = {path[0] for path, attributes in source.attrs.items() if attributes}
    return ", ".join(
        f"{name}={values[place]}" if place in values else f"{name}: {kind}{'D' if place in divisible else ''}"
        for place, (name, kind) in enumerate(source.signature.items())
    )


def _cuobjdump(*arguments: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Print what every case takes on the architectures that are given, as JSON."""
    compiler = Compiler(map(int, sys.argv[1:]))
    for case in CASES:
        compiler.compile(case)
    json.dump([asdict(one) for one in compiler.found], sys.stdout)


if __name__ == "__main__":
    main()
