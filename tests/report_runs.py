"""Run records, evaluations and measurements of speed for tests of the report, consistent in themselves."""

import json
from pathlib import Path

from besa.methods.recipe import Recipe
from besa.methods.shipped import shipped
from besa.record import HISTOGRAM_BINS, RunRecord
from besa.report import Run, load_run

SHAPES = {"self_attn.q_proj": (8, 10), "self_attn.k_proj": (4, 10), "mlp.down_proj": (10, 8)}
WEIGHTS = sum(rows * width for rows, width in SHAPES.values())


def histogram(rates):
    bins = [0] * HISTOGRAM_BINS
    for rate in rates:
        bins[min(HISTOGRAM_BINS - 1, int(rate * HISTOGRAM_BINS))] += 1
    return bins


def linear(name, shape, zeros):
    rows = [zeros // shape[0] + (row < zeros % shape[0]) for row in range(shape[0])]
    return {
        "name": name,
        "shape": list(shape),
        "zeros": zeros,
        "sparsity": zeros / (shape[0] * shape[1]),
        "importance_kept": 1.5,
        "row_rates": histogram([row / shape[1] for row in rows]),
    }


def block(index, zeros, losses, error):
    linears = [
        linear(f"model.layers.{index}.{name}", shape, own)
        for (name, shape), own in zip(SHAPES.items(), zeros, strict=True)
    ]
    return {
        "index": index,
        "name": f"model.layers.{index}",
        "weights": WEIGHTS,
        "zeros": sum(zeros),
        "sparsity": sum(zeros) / WEIGHTS,
        "reconstruction_error": error,
        "losses": losses,
        "seconds": 1.25 + index,
        "linears": linears,
    }


def record(name="besa", sparsity=0.5, blocks=3, **changes):
    """A run that is consistent in itself: learned recipes prune linears unevenly and have losses."""
    learned = name.startswith("besa")
    zeros = [50, 22, 28] if learned else [40, 20, 40]
    if sparsity != 0.5:
        zeros = [round(sparsity * rows * width) for rows, width in SHAPES.values()]
    parts = [block(i, zeros, [0.9, 0.7, 0.5 + i] if learned else [], 0.0123 * (i + 1)) for i in range(blocks)]
    recipe = Recipe.load(name).model_dump(mode="json") if name in shipped() else {"name": name}
    content = {
        "created": "2026-01-05T09:12:44+00:00",
        "recipe": recipe | {"sparsity": sparsity},
        "seed": 7,
        "model": {
            "source": "tiny",
            "gguf": None,
            "architecture": "LlamaForCausalLM",
            "parameters": 910944,
            "dtype": "float32",
            "revision": None,
            "fingerprint": "ab" * 32,
        },
        "calibration": {"source": "c4", "samples": 16, "seqlen": 128, "seed": 7, "sha256": "cd" * 32},
        "versions": {"besa": "0.1.0", "torch": "2.13.0"},
        "machine": {"system": "linux", "processor": "A processor", "threads": 2, "device": "cpu", "gpu": None},
        "blocks": parts,
        "weights": WEIGHTS * blocks,
        "zeros": sum(zeros) * blocks,
        "sparsity": sum(zeros) / WEIGHTS,
        "seconds": 123.4,
        "peak_memory_bytes": 1_234_000_000,
    }
    return RunRecord.model_validate(content | changes).model_dump(mode="json")


DISTILLED = {"losses": [0.4321, 0.1234, 0.2345], "seconds": 5.0, "phases": {"distill": 5.0}}


def evaluation(perplexity, window=128, windows=40, **changes):
    details = {text: {"perplexity": value, "windows": windows, "predicted": 1} for text, value in perplexity.items()}
    content = {"model": "tiny", "perplexity": perplexity, "window": window, "details": details, "sparsity": None}
    return content | {"seconds": 3.5, "created": "2026-01-05T10:00:00+00:00", "versions": {}} | changes


def speeds():
    """A packed model beside the dense one in two forms; decoding is faster, taking in a prompt is not."""

    def model(name, form, decode, prefill):
        timings = [
            {"work": "decode 1", "tokens": 16, "seconds": decode, "low": decode / 2, "high": decode * 2, "limit": 0.1},
            {"work": "prefill 64", "tokens": 64, "seconds": prefill, "low": prefill, "high": prefill, "limit": 0.01},
            {"work": "first token", "tokens": 64, "seconds": 0.25, "low": 0.25, "high": 0.25, "limit": 0.01},
        ]
        sizes = {"file_bytes": 200_000_000, "resident_bytes": None if "," in form else 3e8, "step_bytes": 150_000_000}
        return {"model": name, "form": form, "dtype": "bfloat16", **sizes, "timings": timings}

    return {
        "models": [
            model("dense", "dense", 0.8, 0.5),
            model("dense", "dense, prepacked", 0.4, 0.5),
            model("packed", "sparse", 0.2, 1.0),
        ],
        "bandwidth": 2e10,
        "rounds": 7,
        "created": "2026-01-05T11:00:00+00:00",
        "versions": {},
        "machine": {"processor": "A processor", "threads": 2},
    }


def written(path: Path, run=None, measured=None) -> Run:
    """Write a run folder and read it as the command line does."""
    path.mkdir(parents=True)
    if run is not None:
        (path / "besa_run.json").write_text(json.dumps(run))
    if measured is not None:
        if run is not None and measured["sparsity"] is None:
            measured = measured | {"sparsity": run["sparsity"]}  # as its checkpoint declares it
        (path / "besa_eval.json").write_text(json.dumps(measured))
    return load_run(path)
