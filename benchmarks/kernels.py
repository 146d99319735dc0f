"""Products with sparse weights against dense ones and against the bytes that must be read.

    python -m benchmarks.kernels             # all, half an hour on a quiet machine
    python -m benchmarks.kernels --quick     # one shape, few rounds: for ratios while other work goes on

Every weight is there in more copies than the last cache holds, and each round goes through all of them: sparse, then
torch, then plain reading, then the dense kernel of dense_avx512.cpp or dense_avx2.cpp. Ratios are taken within a round;
medians and quartiles over rounds are written. Needs AVX-512 with bfloat16 and VNNI, or AVX2: dense kernels are written
for these.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.processors import ending
from besa.kernels import build, held, held_dense, sparse, sparse_native
from besa.quantization import Grid, Quantized
from besa.record import now
from besa.storage.formats import bitmask
from besa.storage.formats.bitmask import Bitmask
from besa.system.machine import machine, versions

HERE = Path(__file__).parent
DENSE = {"avx512bf16": "dense_avx512.cpp", "avx2": "dense_avx2.cpp"}  # by the best path of the sparse kernels
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
DTYPES = ("float32", "bfloat16", "int8", "int4")
SPARSITIES = (0.5, 0.6, 0.7)
SPREAD = 0.15  # of the rates of learned rows, to either side
GROUP = 128  # columns that share a step, of int4; of int8, a row does
LAST_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # in KiB, with a K
LEAST = 128 << 20  # bytes that are gone through before a copy is met again
SETTLING = 0.05  # seconds of the same work before it is measured: what comes first in a round is slower without
Work = Callable[[], object]


def main(
    quick: Annotated[bool, typer.Option(help="4096 × 4096 at 50 %, a few rounds.")] = False,
    rounds: Annotated[int, typer.Option(help="Measurements of each case.")] = 21,
    dtypes: Annotated[list[str] | None, typer.Option("--dtype", help="Of the weights; all by default.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="1 and 2 by default.")] = None,
) -> None:
    """Measure, print, and write the result (see `processors.ending`), unless quick or of some dtypes only."""
    path = sparse_native.paths()[0]
    if path not in DENSE:
        raise typer.BadParameter(f"There are no dense kernels to compare with on a processor that has {path} at best.")
    dense = _dense_kernels(DENSE[path])
    rounds, shapes = (5, SHAPES[:1]) if quick else (rounds, SHAPES)
    found: list[dict[str, Any]] = []
    for shape, dtype, count in itertools.product(shapes, dtypes or DTYPES, threads or (1, 2)):
        torch.set_num_threads(count)
        sparsities = SPARSITIES[:1] if quick else SPARSITIES
        for batch in (1, 4, 16):
            for case in _measure(dense, shape, dtype, batch, sparsities if batch == 1 else SPARSITIES[:1], rounds):
                found.append(case)
                print(json.dumps(case), flush=True)
    if not (quick or dtypes):
        result = {
            "cases": found,
            "rounds": rounds,
            "machine": machine(torch.device("cpu")),
            "versions": versions(),
            "created": now(),
        }
        name = f"kernels{ending()}.json"
        (HERE / "results" / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@cache
def gone_through() -> int:
    """Bytes that are read before a copy is met again, in whole MiB: more than the last cache holds."""
    try:
        size = int(LAST_CACHE.read_text(encoding="utf-8").strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return LEAST
    return max(LEAST, size * 5 // 4 >> 20 << 20)


def _dense_kernels(name: str) -> ctypes.CDLL:
    """The kernels of a file here, which takes what it can from the sparse ones."""
    with tempfile.TemporaryDirectory() as scratch:
        built = f"{scratch}/dense.so"
        source = ["-I", str(Path(build.__file__).parent), str(HERE / name)]
        subprocess.run(["c++", *build.FLAGS, "-fopenmp", "-shared", *source, "-o", built], check=True)
        return ctypes.CDLL(built)


def _measure(
    dense: ctypes.CDLL, shape: tuple[int, int], dtype: str, batch: int, sparsities: tuple[float, ...], rounds: int
) -> list[dict[str, Any]]:
    """All masks of one shape and dtype, in turn with what is dense."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.bfloat16 if dtype.startswith("int") else getattr(torch, dtype)
    x_NI = torch.randn(batch, shape[1], generator=generator).to(numbers)
    masks = list(itertools.product(("learned", "random"), sparsities))
    weights = [_weight(shape, dtype, sparsity, kind == "learned", generator) for kind, sparsity in masks]
    whole = _weight(shape, dtype, 0.0, False, generator)
    many = torch.ones(gone_through(), dtype=torch.uint8)
    works: dict[Any, list[Work]] = {
        mask: [partial(sparse.Product(copy), x_NI) for copy in _copies(weight)]
        for mask, weight in zip(masks, weights, strict=True)
    }
    works["torch"] = _torch(x_NI, whole)
    works["reading"] = [partial(dense.read_all, many.data_ptr(), ctypes.c_int64(many.numel()), torch.get_num_threads())]
    dense.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    if batch == 1:
        works["dense"] = _dense(dense, x_NI, whole)
    seconds: dict[Any, list[float]] = {name: [] for name in works}
    for _, (name, work) in itertools.product(range(rounds), works.items()):
        settled = time.perf_counter() + SETTLING
        while time.perf_counter() < settled:
            for one in work:
                one()
        began = time.perf_counter()
        for one in work:
            one()
        seconds[name].append((time.perf_counter() - began) / len(work))
    byte = [value / many.numel() for value in seconds["reading"]]
    return [
        {
            "shape": shape,
            "dtype": dtype,
            "batch": batch,
            "threads": torch.get_num_threads(),
            "masks": mask[0],
            "sparsity": mask[1],
            "bytes": weight.nbytes,
            "ms": _spread([1e3 * value for value in seconds[mask]]),
            "times_faster_than_dense": _ratio(seconds.get("dense", []), seconds[mask]),
            "times_faster_than_torch": _ratio(seconds["torch"], seconds[mask]),
            "share_of_bytes_limit": _ratio([each * weight.nbytes for each in byte], seconds[mask]),
            "read_gb_per_second": _spread([1e-9 / each for each in byte]),
        }
        for mask, weight in zip(masks, weights, strict=True)
    ]


def _weight(shape: tuple[int, int], dtype: str, sparsity: float, learned: bool, generator: torch.Generator) -> Bitmask:
    """A random weight whose rows lose about as much each, or differ as learned ones do."""
    rates_O1 = torch.full((shape[0], 1), sparsity)
    if learned:
        rates_O1 += SPREAD * (2 * torch.rand(shape[0], 1, generator=generator) - 1)
    kept_OI = torch.rand(shape, generator=generator) >= rates_O1
    if not dtype.startswith("int"):
        w_OI = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
        return bitmask.pack(torch.where(kept_OI, w_OI, 0))
    bits = int(dtype.removeprefix("int"))
    zero = 2 ** (bits - 1)
    codes_OI = torch.randint(2**bits - 1, shape, generator=generator, dtype=torch.uint8)
    codes_OI = torch.where(kept_OI, codes_OI + (codes_OI >= zero).to(torch.uint8), zero).to(torch.uint8)
    groups = shape[1] // GROUP if bits == 4 else 1
    step_OG = (0.01 * (1 + torch.rand(shape[0], groups, generator=generator))).bfloat16().float()
    grid = Grid(step_OG, torch.full_like(step_OG, zero), bits)
    return bitmask.pack_codes(Quantized(codes_OI, grid, False, torch.bfloat16))


def _copies(weight: Bitmask) -> list[Bitmask]:
    """More of them than the last cache holds."""
    names = [name for name, value in vars(weight).items() if isinstance(value, Tensor)]
    count = 1 + gone_through() // weight.nbytes
    return [replace(weight, **{name: getattr(weight, name).clone() for name in names}) for _ in range(count)]


def _dense(kernels: ctypes.CDLL, x_NI: Tensor, weight: Bitmask) -> list[Work]:
    """Calls of the dense kernel, which gets a weight's values in order, two codes of four bits to a byte.

    Where the runtime holds codes dense itself, they are calls of its own kernel.
    """
    if weight.bits is not None and sparse_native.paths()[0] == held_dense.PATH:
        return [partial(held.Product(copy), x_NI) for copy in _copies(weight)]
    values = weight.unpack() if weight.bits is None else weight.unpack_codes().codes_OI
    if weight.bits == 4:
        values = values[:, ::2] | values[:, 1::2] << 4
    x_NI, y_NO = x_NI.float(), torch.empty(1, weight.shape[0])
    kernel, threads = kernels[f"dense_{weight.kind}"], ctypes.c_int64(torch.get_num_threads())
    x, y = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x_NI, y_NO))

    def call(copy: Bitmask, *_: Tensor) -> None:
        kernel(ctypes.byref(sparse_native.passed(copy)), x, y, threads)

    works: list[Work] = [
        partial(call, copy, x_NI, y_NO) for copy in _copies(replace(weight, values=values.contiguous()))
    ]
    works[0]()
    torch.testing.assert_close(y_NO, sparse_native.multiply(x_NI, weight), rtol=1e-3, atol=1e-2)
    return works


def _torch(x_NI: Tensor, weight: Bitmask) -> list[Work]:
    """Calls of what torch has for the dtype: its linear, or its kernels for packed codes."""
    if weight.bits is None:
        dense_OI = weight.unpack()
        copies = [dense_OI.clone() for _ in range(1 + gone_through() // dense_OI.nbytes)]
        return [partial(torch.nn.functional.linear, x_NI, w_OI) for w_OI in copies]
    codes_OI, scales_OG = weight.unpack_codes().codes_OI, weight.scales_OG
    assert scales_OG is not None
    if weight.bits == 8:
        signed_OI = (codes_OI.short() - 128).to(torch.int8)
        copies = [signed_OI.clone() for _ in range(1 + gone_through() // signed_OI.nbytes)]
        return [partial(torch._weight_int8pack_mm, x_NI, w_OI, scales_OG[:, 0].contiguous()) for w_OI in copies]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI.int(), 1)
    grid = torch.stack([scales_OG, torch.zeros_like(scales_OG)], dim=2).transpose(0, 1).contiguous()
    copies = [packed.clone() for _ in range(1 + gone_through() // packed.nbytes)]
    return [partial(torch.ops.aten._weight_int4pack_mm_for_cpu, x_NI, w, GROUP, grid) for w in copies]


def _ratio(slow: list[float], fast: list[float]) -> dict[str, float] | None:
    return _spread([a / b for a, b in zip(slow, fast, strict=True)]) if slow else None


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": round(median, 4), "quartiles": [round(low, 4), round(high, 4)]}


if __name__ == "__main__":
    typer.run(main)
