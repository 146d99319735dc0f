"""Products of several rows of x: each way of besa, beside the dense weight in torch's fastest form.

    python -m benchmarks.batches                # a minute on a quiet machine

Every weight is there in more copies than the last cache holds, and each round goes through all of them in turn. What is
printed is how many times as fast as the prepacked dense bfloat16 weight each way is: the middle of the rounds' ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer

from benchmarks.kernels import Work, _copies, _weight, gone_through
from besa.kernels import choosing, dense, sparse

SHAPES = [(2048, 2048), (8192, 2048), (2048, 8192)]
COUNTS = (1, 4, 16, 64, 512)


def main(
    rounds: Annotated[int, typer.Option(help="Measurements of each case.")] = 7,
    threads: Annotated[int, typer.Option(help="Of torch and of the kernels.")] = 2,
    dtypes: Annotated[list[str] | None, typer.Option("--dtype", help="Of the weights; all by default.")] = None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(threads)
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(0)
        whole_OI = torch.randn(shape, generator=generator).bfloat16()
        kinds = dtypes or ["bfloat16", "int8", "int4"]
        weights = {kind: _copies(_weight(shape, kind, 0.5, True, generator)) for kind in kinds}
        wholes = [whole_OI.clone() for _ in range(1 + gone_through() // whole_OI.nbytes)]
        layouts = [torch.ops.mkldnn._reorder_linear_weight(w_OI, None) for w_OI in wholes]
        for count in COUNTS:
            x_NI = torch.randn(count, shape[1], generator=generator).bfloat16()
            works: dict[str, list[Work]] = {"prepacked": [_prepacked(x_NI, layout) for layout in layouts]}
            for way, multiply in dense.WAYS.items():
                works[f"dense {way}"] = [_work(multiply, x_NI, w_OI) for w_OI in wholes]
            for kind, copies in weights.items():
                for way, multiply in (*sparse.WAYS.items(), ("chosen", sparse.multiplied)):
                    works[f"{kind} {way}"] = [_work(multiply, x_NI, copy) for copy in copies[: len(layouts)]]
            print(shape, count, _ratios(works, rounds if count < choosing.COUNTS[-1] else 3), flush=True)


def _prepacked(x_NI: torch.Tensor, layout: torch.Tensor) -> Work:
    return lambda: torch.ops.mkldnn._linear_pointwise(x_NI, layout, None, "none", [], "")


def _work(multiply: Callable[..., object], x_NI: torch.Tensor, weight: object) -> Work:
    return lambda: multiply(x_NI, weight)


def _ratios(works: dict[str, list[Work]], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            for one in work:
                one()
            if turn:
                seconds[name].append((time.perf_counter() - began) / len(work))
    base = seconds.pop("prepacked")
    return {
        name: round(statistics.median(a / b for a, b in zip(base, values, strict=True)), 2)
        for name, values in seconds.items()
    }


if __name__ == "__main__":
    typer.run(main)
