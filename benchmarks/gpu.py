"""Speed and memory on a GPU: a block of 7B and 70B by recipe, and the kernels, against the limits of the card.

    make bench-gpu                                    # python -m benchmarks.gpu: all of it
    python -m benchmarks.gpu --shape 7B --recipe besa --samples 32

The limits are measured in the same run: bytes by a large copy, products by large matrices. A share is the time that the
limits allow, for the operations and bytes that the program asks for (benchmarks/weightless.py), over the time it took.
Weights and tokens are random. Everything goes to results/gpu-<card>.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedConfig

from benchmarks.operations import Operation, Seen
from benchmarks.random_model import config
from besa import kernels
from besa.api import default_batch
from besa.data.calibration import Calibration
from besa.errors import BesaError
from besa.kernels import sparse
from besa.methods.recipe import Recipe
from besa.models.activations import Room
from besa.models.streaming import DecoderInMemory
from besa.pruning.loop import prune_blocks
from besa.pruning.paths import Resources
from besa.quantization import Grid, Quantized
from besa.record import now
from besa.storage.formats import bitmask
from besa.storage.formats.bitmask import Bitmask
from besa.system import memory
from besa.system.devices import device_name, synchronize, total_bytes
from besa.system.machine import machine, versions

RESULTS = Path(__file__).parent / "results"
WEIGHTS = [(4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192)]
BATCHES = (1, 2, 4, 8)
KINDS = ("bfloat16", "float16", "float32", "int8", "int4")
SPARSITY, BINS, COLUMNS = 0.5, 101, 128  # of weights; of candidates; swept at a time
COLD = 1 << 28  # bytes that are gone through before a weight is met again: more than any cache
LARGE = 1 << 30  # bytes of the copy
SIDE = 8192  # of the matrices
ROUNDS = 7


@dataclass(frozen=True)
class Limits:
    """What a device can do at best, measured.

    Attributes:
        bandwidth: bytes a second, read and written.
        half: operations a second of products of bfloat16.
        tf32: the same of TF32.
        float32: the same of float32.
    """

    bandwidth: float
    half: float
    tf32: float
    float32: float

    def seconds(self, found: Seen) -> float:
        """The least time for what a phase asks for."""
        rates = {"half": self.half, "tf32": self.tf32, "float32": self.float32}
        return sum(
            times * max(one.flops / rates.get(one.kind, self.float32), one.bytes / self.bandwidth)
            for one, times in found.operations.items()
        )


def main(
    shapes: Annotated[list[str] | None, typer.Option("--shape", help="7B or 70B; both by default.")] = None,
    recipes: Annotated[list[str] | None, typer.Option("--recipe", help="wanda, besa, fast by default.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    seqlen: Annotated[int, typer.Option(help="Tokens of each.")] = 2048,
) -> None:
    """Measure, print, and write results/gpu-<card>.json."""
    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device that torch can use here: benchmarks.gpu measures only on a GPU.")
    device = torch.device("cuda", 0)
    found = limits(device)
    result: dict[str, Any] = {"limits": asdict(found), "kernels": [], "blocks": []}
    for case in kernel_cases(device, found, WEIGHTS, ROUNDS):
        result["kernels"].append(case)
        print(json.dumps(case), flush=True)
    for shape in shapes or ("7B", "70B"):
        for recipe in recipes or ("wanda", "besa", "fast"):
            case = {"shape": shape, **block(device, found, config(shape, 2), Recipe.load(recipe), samples, seqlen)}
            result["blocks"].append(case)
            print(json.dumps(case), flush=True)
    about = {"machine": machine(device), "versions": versions(), "created": now(), "tokens": f"{samples} × {seqlen}"}
    card = str(device_name(device)).lower().replace(" ", "-").replace("/", "-")
    (RESULTS / f"gpu-{card}.json").write_text(json.dumps(about | result, indent=1) + "\n", encoding="utf-8")


def limits(device: torch.device, large: int = LARGE, side: int = SIDE) -> Limits:
    """Measure what the device can do: a copy of `large` bytes, and products of matrices of `side` rows and columns."""
    x, y = (torch.empty(large // 2, dtype=torch.bfloat16, device=device) for _ in range(2))
    matmul, rates = torch.backends.cuda.matmul, []
    before = matmul.fp32_precision
    for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")):
        a_II = torch.randn(side, side, device=device).to(dtype)
        matmul.fp32_precision = precision
        rates.append(2 * side**3 / seconds_of(device, [partial(torch.mm, a_II, a_II)], ROUNDS))
    matmul.fp32_precision = before
    return Limits(2 * large / seconds_of(device, [partial(y.copy_, x)], ROUNDS), *rates)


def seconds_of(device: torch.device, works: Sequence[Callable[[], object]], rounds: int) -> float:
    """The median over rounds of the mean time of one of the works, which run one after the other."""
    found = []
    for number in range(rounds + 1):  # the first compiles and warms up
        synchronize(device)
        began = time.perf_counter()
        for work in works:
            work()
        synchronize(device)
        if number:
            found.append((time.perf_counter() - began) / len(works))
    return statistics.median(found)


def kernel_cases(
    device: torch.device, found: Limits, weights: list[tuple[int, int]], rounds: int, cold: int = COLD
) -> Iterator[dict[str, Any]]:
    """Each kernel on each weight: seconds, and the share of the limit that its bytes set."""
    for rows, columns in weights:
        yield from _learning_cases(device, rows, columns, found, rounds, cold)
        for kind in KINDS:
            yield from _sparse_cases(device, kind, rows, columns, found, rounds, cold)


def _learning_cases(
    device: torch.device, rows: int, columns: int, found: Limits, rounds: int, cold: int
) -> Iterator[dict[str, Any]]:
    """The kernels of a learning step, and SparseGPT's sweep over some columns."""
    w_OI = torch.randn(rows, columns, device=device).to(torch.bfloat16)
    every = [w_OI.clone() for _ in range(max(1, cold // w_OI.nbytes))]
    ranks_OI = torch.rand(rows, columns, device=device).argsort(dim=1).to(torch.int16)
    counts_O = torch.full((rows,), round(SPARSITY * columns), device=device)
    bins_I = (torch.arange(columns, device=device) * BINS // columns).to(torch.int16)
    sums_OB, out_OI = torch.empty(rows, BINS, device=device), torch.empty_like(w_OI)
    masking = [partial(kernels.masked, w, ranks_OI, counts_O, out_OI) for w in every]
    binning = [partial(kernels.binned, w, w_OI, ranks_OI, bins_I, sums_OB) for w in every]
    yield _case("masked", w_OI, masking, 6, found, rounds)
    yield _case("binned", w_OI, binning, 6, found, rounds)
    block_OB = torch.randn(rows, COLUMNS, device=device)
    kept_OB, error_OB, factor_BB = block_OB > 0, torch.empty_like(block_OB), torch.eye(COLUMNS, device=device)
    sweeping = partial(kernels.swept, block_OB, kept_OB, factor_BB, error_OB)
    yield _case("swept", block_OB, [sweeping], 13, found, rounds)


def _case(
    name: str, w_OI: Tensor, works: Sequence[Callable[[], object]], of_weight: float, found: Limits, rounds: int
) -> dict[str, Any]:
    """One kernel, that moves so many bytes for each weight."""
    seconds = seconds_of(w_OI.device, works, rounds)
    share = of_weight * w_OI.numel() / found.bandwidth / seconds
    return {"kernel": name, "shape": list(w_OI.shape), "seconds": seconds, "share_of_bytes": share}


def _sparse_cases(
    device: torch.device, kind: str, rows: int, columns: int, found: Limits, rounds: int, cold: int
) -> Iterator[dict[str, Any]]:
    """Unpacking, and products of a few rows of x beside torch's own with the dense weight."""
    weight = _moved(_weight(kind, rows, columns), device)
    copies = [_copy(weight) for _ in range(max(1, cold // weight.nbytes))]
    dense_OI = sparse.unpacked(weight)
    about = {"kind": kind, "shape": [rows, columns]}
    seconds = seconds_of(device, [partial(sparse.unpacked, w) for w in copies], rounds)
    moved = weight.nbytes + dense_OI.nbytes
    yield {"kernel": "unpack", **about, "seconds": seconds, "share_of_bytes": moved / found.bandwidth / seconds}
    dense = [dense_OI.clone() for _ in range(max(1, cold // dense_OI.nbytes))]
    for batch in BATCHES:
        x_NI = torch.randn(batch, columns, device=device).to(weight.dtype)
        seconds = seconds_of(device, [partial(sparse.multiplied, x_NI, w) for w in copies], rounds)
        torch_seconds = seconds_of(device, [partial(linear, x_NI, w_OI) for w_OI in dense], rounds)
        yield {
            "kernel": "multiply",
            **about,
            "batch": batch,
            "seconds": seconds,
            "share_of_bytes": weight.nbytes / found.bandwidth / seconds,
            "torch_seconds": torch_seconds,
            "times_torch": torch_seconds / seconds,
        }


def _weight(kind: str, rows: int, columns: int) -> Bitmask:
    """A sparse weight; codes of four bits have a grid for 128 columns, those of eight for a row."""
    generator = torch.Generator().manual_seed(0)
    kept_OI = torch.rand(rows, columns, generator=generator) >= SPARSITY
    if not kind.startswith("int"):
        return bitmask.pack(torch.randn(rows, columns, generator=generator).where(kept_OI, 0).to(getattr(torch, kind)))
    bits = int(kind[3:])
    groups = max(1, columns // 128) if bits == 4 else 1
    middle = 2 ** (bits - 1)
    codes_OI = torch.randint(1, middle, (rows, columns), generator=generator).where(kept_OI, middle).to(torch.uint8)
    grid = Grid(torch.full((rows, groups), 0.01), torch.full((rows, groups), float(middle)), bits)
    return bitmask.pack_codes(Quantized(codes_OI, grid, False, torch.bfloat16))


def _moved(weight: Bitmask, device: torch.device) -> Bitmask:
    return _each(weight, lambda tensor: tensor.to(device))


def _copy(weight: Bitmask) -> Bitmask:
    return _each(weight, torch.clone)


def _each(weight: Bitmask, change: Callable[[Tensor], Tensor]) -> Bitmask:
    tensors = (weight.masks_BCR, weight.values, weight.offsets, weight.scales_OG, weight.zeros_OG)
    changed = (None if tensor is None else change(tensor) for tensor in tensors)
    return Bitmask(weight.shape, *changed, bits=weight.bits)  # type: ignore[arg-type]


def block(
    device: torch.device, found: Limits, settings: PreTrainedConfig, recipe: Recipe, samples: int, seqlen: int
) -> dict[str, Any]:
    """Prune two blocks of random weights; seconds and share of the limit of the second, by phase, and peak memory."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for module in model.modules():
        if "RotaryEmbedding" in type(module).__name__:
            module.__init__(settings, device="cpu")  # type: ignore[misc]
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02, generator=generator) if parameter.dim() > 1 else parameter.data.fill_(1.0)
    tokens_NT = torch.randint(settings.vocab_size, (samples, seqlen), generator=generator)
    calibration = Calibration(tokens_NT, "random tokens", 0)
    memory.reset_peak(device)
    began = time.perf_counter()
    records = prune_blocks(
        DecoderInMemory(model.eval().requires_grad_(False)),
        recipe,
        calibration,
        resources=Resources(default_batch(samples, seqlen, device), device, Room(device)),
    ).records
    seconds = time.perf_counter() - began
    free = total_bytes(device)
    one, two = (_asked(settings, depth, recipe, samples, seqlen, free) for depth in (1, 2))
    phases = {}
    for name, taken in records[-1].phases.items():
        if taken and name in two:
            phases[name] = {"seconds": taken, "share": found.seconds(two[name].less(one[name])) / taken}
    return {
        "recipe": recipe.name,
        "seconds": records[-1].seconds,
        "before_seconds": seconds - sum(record.seconds for record in records),
        "peak_bytes": memory.peak_gpu_bytes(device),
        "phases": phases,
    }


def _asked(
    settings: PreTrainedConfig, blocks: int, recipe: Recipe, samples: int, seqlen: int, memory: int
) -> dict[str, Seen]:
    """What the run of a model of so many blocks asks of the device, by phase; another process works it out."""
    question = {
        "config": settings.to_dict() | {"num_hidden_layers": blocks},
        "recipe": recipe.model_dump(mode="json"),
        "samples": samples,
        "seqlen": seqlen,
        "memory": memory,
    }
    command = [sys.executable, "-m", "benchmarks.weightless"]
    without_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, input=json.dumps(question), env=without_gpu, capture_output=True, text=True, check=True
    )
    return {
        name: Seen(Counter({Operation(*operation): times for *operation, times in found}))
        for name, found in json.loads(done.stdout).items()
    }


if __name__ == "__main__":
    try:
        typer.run(main)
    except BesaError as error:
        raise SystemExit(str(error)) from None
