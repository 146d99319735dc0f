"""What learning an allocation costs, in forward equivalents, by phase, and how it grows.

    python -m benchmarks.cost methods    # SmolLM2-135M by wanda, sparsegpt, besa, besa-layerwise, fast
    python -m benchmarks.cost masks      # the mask work of a learning step against its bytes limit
    python -m benchmarks.cost growth     # with samples, tokens, width and depth

A forward equivalent is the time of one plain dense forward pass of the whole calibration set through all blocks, in the
same process, with the same batch, dtype and threads; see README.md.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.random_model import SHAPES, TOKENIZER, config, write
from besa import Recipe, compress, kernels
from besa.counting.precision import dtype_name
from besa.data.calibration import sample
from besa.methods.allocation.rates import candidate_bins, candidate_rates
from besa.models.ends import capture_inputs
from besa.models.finding import find_blocks
from besa.models.loading import load_model, load_tokenizer
from besa.models.source import locate
from besa.record import RunRecord, now
from besa.system import memory
from besa.system.machine import machine, versions

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
EPOCH = ("allocation.steps={samples}", "allocation.crop=1")  # every token once, as in the paper
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "wanda": ("wanda", ()),
    "sparsegpt": ("sparsegpt", ()),
    "besa": ("besa", ()),
    "besa-layerwise": ("besa-layerwise", ()),
    "besa, one epoch": ("besa", EPOCH),
    "fast": ("fast", ()),
}
app = typer.Typer(help=__doc__, add_completion=False)
Samples = Annotated[int, typer.Option(help="Calibration sequences.")]
Seqlen = Annotated[int, typer.Option(help="Tokens of each.")]


@app.command()
def methods(
    folder: Annotated[Path, typer.Argument(help="Where the checkpoints go; must not exist.")],
    samples: Samples = 64,
    seqlen: Seqlen = 512,
    dtype: str = "float32",
    only: Annotated[
        list[str] | None, typer.Option(help="Methods to run (repeatable); the others' results stay.")
    ] = None,
) -> None:
    """Whole runs on SmolLM2-135M, from a folder of safetensors to folders of safetensors."""
    source = locate("smollm2")
    load_model(source, dtype).save_pretrained(folder / "dense")
    load_tokenizer(source).save_pretrained(folder / "dense")
    path = RESULTS / f"cost-methods-{dtype}.json"
    rows = {row["method"]: row for row in json.loads(path.read_text("utf-8"))["methods"]} if only else {}
    memory.stay_lean()  # as runs do: it may change the time of a pass
    dense = [_dense_pass(folder / "dense", samples, seqlen)]
    for name in only or METHODS:
        recipe, overrides = METHODS[name]
        settings = Recipe.load(recipe, 0.5, [override.format(samples=samples) for override in overrides])
        row = {"method": name} | _run(
            folder / "dense", folder / name.replace(", ", "-").replace(" ", "-"), settings, samples, seqlen
        )
        dense.append(_dense_pass(folder / "dense", samples, seqlen))
        forward = statistics.mean(dense[-2:])  # before and after the run: the machine may have changed
        equivalents = {phase: value / forward for phase, value in row["seconds"].items()}
        rows[name] = row | {"forward_equivalents": equivalents, "dense_pass": forward, "created": now()}
        parts = ", ".join(f"{phase} {value:.2f}" for phase, value in equivalents.items())
        print(f"{name}: {parts}; {row['peak_memory_bytes'] / 1e9:.2f} GB", flush=True)
        found = [rows[name] for name in METHODS if name in rows]
        _write(path.name, {"calibration": f"{samples} × {seqlen} tokens", "dtype": dtype, "methods": found})


def _run(model: Path, out: Path, recipe: Recipe, samples: int, seqlen: int) -> dict[str, Any]:
    """Seconds by phase of one run, and its peak memory."""
    marks: list[tuple[float, str]] = []
    began = time.perf_counter()
    compress(
        model,
        recipe,
        "c4",
        out=out,
        samples=samples,
        seqlen=seqlen,
        device="cpu",
        progress=lambda done, total, note="": marks.append((time.perf_counter(), note)),
    )
    ended = time.perf_counter()
    record = RunRecord.read(out / "besa_run.json")
    seconds: dict[str, float] = {}
    for block in record.blocks:
        for phase, value in block.phases.items():
            seconds[phase] = seconds.get(phase, 0.0) + value
    loop = next(at for at, note in marks if note == "embeddings")
    seconds["open"] = loop - began  # configuration, tokenizer, calibration text
    seconds["join"] = ended - marks[-1][0]  # of the finished blocks to a checkpoint
    seconds["journal and embeddings"] = ended - began - sum(seconds.values())
    return {
        "seconds": {"whole": ended - began} | seconds,
        "peak_memory_bytes": record.peak_memory_bytes,
        "sparsity": record.sparsity,
        "steps": statistics.mean(len(block.losses) for block in record.blocks),
    }


def _dense_pass(folder: Path, samples: int, seqlen: int) -> float:
    """Seconds of the calibration set's way through all dense blocks."""
    source = locate(folder)
    model = load_model(source)
    blocks = find_blocks(model)
    tokens_NT = sample("c4", load_tokenizer(source), samples, seqlen, 0).tokens_NT
    batch = max(1, 2048 // seqlen)
    x_NTC = torch.cat(list(capture_inputs(model, blocks, tokens_NT, batch)))
    began = time.perf_counter()
    for block in blocks:
        block.run(x_NTC, batch, into=x_NTC)
    return time.perf_counter() - began


@app.command()
def masks() -> None:
    """Both passes over a weight, in turn over copies that no cache holds, against the bytes they must move."""
    bandwidth = _bandwidth()
    rows = []
    for (rows_, columns), dtype in itertools.product(
        [(576, 576), (1536, 576), (576, 1536), (4096, 4096), (11008, 4096), (4096, 11008)],
        [torch.float32, torch.bfloat16],
    ):
        row = _mask_work(rows_, columns, dtype, bandwidth)
        rows.append(row)
        print(json.dumps(row), flush=True)
    _write("cost-masks.json", {"copy_bytes_per_second": bandwidth, "weights": rows})


def _bandwidth() -> float:
    """Bytes a second that copying a large tensor reads and writes together."""
    source = torch.rand(64 << 20)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source))


def _mask_work(rows: int, columns: int, dtype: torch.dtype, bandwidth: float) -> dict[str, Any]:
    copies = max(2, (200 << 20) // (rows * columns * 10))
    ranks_OI = torch.rand(rows, columns).argsort(dim=1).to(torch.int16)
    sets = [(torch.randn(rows, columns).to(dtype), ranks_OI.clone()) for _ in range(copies)]
    out_OI, gradient_OI = ([torch.randn(rows, columns).to(dtype) for _ in range(copies)] for _ in range(2))
    counts_O = torch.full((rows,), columns // 2)
    rates_D = candidate_rates(0.01)
    bins_I = candidate_bins(rates_D, columns)
    sums_OB = torch.empty(rows, len(rates_D))

    def mask() -> None:
        for (w_OI, ranks), out in zip(sets, out_OI, strict=True):
            kernels.masked(w_OI, ranks, counts_O, out)

    def bin_() -> None:
        for (w_OI, ranks), gradient in zip(sets, gradient_OI, strict=True):
            kernels.binned(gradient, w_OI, ranks, bins_I, sums_OB)

    masked, binned = (_seconds(work) / copies for work in (mask, bin_))
    # Each reads two weights' worth or reads one and writes one, with the ranks; the second writes its sums.
    moved = 2 * (2 * dtype.itemsize + 2) * rows * columns + sums_OB.nbytes
    return {
        "shape": [rows, columns],
        "dtype": dtype_name(dtype),
        "masked_ms": 1e3 * masked,
        "binned_ms": 1e3 * binned,
        "limit_ms": 1e3 * moved / bandwidth,
        "over_limit": (masked + binned) * bandwidth / moved,
    }


def _seconds(work: Callable[[], object], times: int = 9) -> float:
    """Median of some runs, after one that does not count."""
    work()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


@app.command()
def growth(recipe: str = "besa") -> None:
    """Seconds of the blocks of a random Llama, as one of its sizes grows."""
    SHAPES.update(
        {
            f"width {width}": (width, 8 * width // 3 // 64 * 64, width // 64, width // 64)
            for width in (576, 1024, 2048, 4096)
        }
    )
    whole = "allocation.steps={samples}"
    cases: dict[str, list[tuple[float, tuple[str, int, int, int]]]] = {
        "samples": [(n, ("135M", 2, n, 256)) for n in (16, 32, 64, 128)],
        "tokens": [(n, ("135M", 2, 16, n)) for n in (128, 256, 512, 1024)],
        "depth": [(n, ("135M", n, 16, 256)) for n in (2, 4, 8, 16)],
        "weights of a block": [],
    }
    for width in (576, 1024, 2048, 4096):
        hidden, feed_forward, _, _ = SHAPES[f"width {width}"]
        cases["weights of a block"].append((4 * hidden**2 + 3 * hidden * feed_forward, (f"width {width}", 2, 8, 256)))
    result = {}
    for name, points in cases.items():
        found = []
        for size, (shape, blocks, samples, seqlen) in points:
            settings = Recipe.load(recipe, 0.5, [whole.format(samples=samples)])
            found.append((size, _block_seconds(settings, shape, blocks, samples, seqlen)))
            print(name, *found[-1], flush=True)
        result[name] = {"points": found, "exponent": _exponent(found)}
    _write(f"cost-growth-{recipe}.json", result)


def _block_seconds(recipe: Recipe, shape: str, blocks: int, samples: int, seqlen: int) -> float:
    """Seconds of all blocks of a run."""
    with tempfile.TemporaryDirectory(prefix="besa-cost-") as scratch:
        write(Path(scratch) / "model", config(shape, blocks))
        text = str(TOKENIZER / "calibration.txt")
        out = Path(scratch) / "out"
        compress(Path(scratch) / "model", recipe, text, out=out, samples=samples, seqlen=seqlen, device="cpu")
        return sum(block.seconds for block in RunRecord.read(out / "besa_run.json").blocks)


def _exponent(points: list[tuple[float, float]]) -> float:
    """Slope of a straight line through the logarithms."""
    fit = statistics.linear_regression(*zip(*((math.log(x), math.log(y)) for x, y in points), strict=True))
    return fit.slope


def _write(name: str, result: dict[str, Any]) -> None:
    result |= {"machine": machine(CPU), "versions": versions(), "created": now()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
