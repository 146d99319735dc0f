"""What pruning will take on GPUs, worked out on a machine without one: a forecast, not a measurement.

    python -m benchmarks.gpu_forecast    # minutes; writes results/gpu-forecast.json and prints its tables

The program itself runs at the real size, without numbers (benchmarks/weightless.py): one block, then two. Every
operator is seen with its shapes; the difference between the runs is a block, the rest comes before. An operator takes
as long as its arithmetic or its bytes need at a stated share of the published rates, whichever is longer. Copies of
hidden states and weights go beside the computation, as do launches where the device has more to do than the host.
Reading, writing and hashing of files are worked out from the bytes of a block. One block is read and another written
while a third is computed; at the end, all files are read and hashed again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer
from transformers import PreTrainedConfig

from benchmarks.operations import Operation, Seen
from benchmarks.random_model import config
from benchmarks.weightless import seen
from besa.methods.recipe import Recipe
from besa.planning.passes import states_measured

RESULTS = Path(__file__).parent / "results" / "gpu-forecast.json"
NOTE = "A forecast from counted work and published rates. Nothing of it was measured on a GPU."
SHAPES = {"7B": 32, "70B": 80}  # of LLaMA-2, with their blocks
RECIPES = ("wanda", "besa", "fast")
SAMPLES, SEQLEN = 128, 2048
# Shares of the published rates that are taken to be attainable, and other assumptions. They are guesses.
PRODUCTS, BANDWIDTH, PCIE = 0.6, 0.75, 0.75
LAUNCH = 4e-6  # seconds of the host for an operator
SHORTEST = 2e-6  # seconds of the device for an operator
WAIT = 20e-6  # seconds for the host to wait and go on
READ = 2.5e9  # bytes a second from a disk
WRITE = 2e9  # bytes a second to a disk
HASH = 1.7e9  # bytes a second through sha256 (docs/formats.md), by each of several threads
ITEM = 2  # bytes of a bfloat16


@dataclass(frozen=True)
class Card:
    """Published rates of a GPU, without structured sparsity.

    Attributes:
        name: of the card.
        half: multiply-adds of bfloat16, operations a second.
        tf32: the same of TF32.
        float32: the same of float32.
        bandwidth: bytes a second of its memory.
        pcie: bytes a second in one direction.
        memory: bytes.
        source: of the rates.
    """

    name: str
    half: float
    tf32: float
    float32: float
    bandwidth: float
    pcie: float
    memory: int
    source: str

    def seconds(self, operation: Operation) -> float:
        """Of one launch: its arithmetic or its bytes, whichever takes longer."""
        rate = {"half": self.half, "tf32": self.tf32, "float32": self.float32}.get(operation.kind, self.float32)
        return max(operation.flops / rate / PRODUCTS, operation.bytes / self.bandwidth / BANDWIDTH, SHORTEST)


CARDS = [
    Card("A100 80 GB SXM", 312e12, 156e12, 19.5e12, 2.039e12, 32e9, 80 * 10**9, "NVIDIA A100 datasheet, PCIe 4.0 x16"),
    Card("H100 80 GB SXM", 989e12, 495e12, 67e12, 3.35e12, 64e9, 80 * 10**9, "NVIDIA H100 datasheet, PCIe 5.0 x16"),
    Card(
        "RTX 4090 24 GB",
        165e12,
        82.6e12,
        82.6e12,
        1.008e12,
        32e9,
        24 * 10**9,
        "NVIDIA Ada architecture whitepaper, products of bfloat16 added in float32, PCIe 4.0 x16",
    ),
]


@dataclass(frozen=True)
class Phase:
    """A phase of one block, or what comes before the first block, on one card.

    Attributes:
        seconds: the longest of device, host and pcie.
        device: seconds in which the device computes.
        host: seconds in which the host launches and waits.
        pcie: seconds in which bytes travel, from the disk for weights.
        limit: what takes longest: products, bytes, launches, pcie or disk.
        teraflops: of matrix products.
        gigabytes: read and written in device memory.
        travelling: gigabytes between device and host or disk.
        launches: operators that the host launches.
        syncs: times the host waits.
    """

    seconds: float
    device: float
    host: float
    pcie: float
    limit: str
    teraflops: float
    gigabytes: float
    travelling: float
    launches: float
    syncs: float


def phase(card: Card, found: Seen, from_disk: bool) -> Phase:
    """The time of a phase on a card.

    Args:
        card: the GPU.
        found: what the phase asks of it.
        from_disk: whether what goes to the device is read from the disk first.
    """
    products = other = 0.0
    for operation, times in found.operations.items():
        seconds = times * card.seconds(operation)
        by_products = operation.flops and seconds <= times * operation.flops / _rate(card, operation) / PRODUCTS * 1.001
        products, other = (products + seconds, other) if by_products else (products, other + seconds)
    launches = found.operations.total()
    host = launches * LAUNCH + found.syncs * WAIT
    incoming = min(card.pcie * PCIE, READ) if from_disk else card.pcie * PCIE
    pcie = found.to_device / incoming + found.to_host / (card.pcie * PCIE)
    times = {
        "products": products + other if products >= other else 0.0,
        "bytes": products + other if products < other else 0.0,
        "launches": host,
        "disk" if from_disk else "pcie": pcie,
    }
    limit = max(times, key=lambda name: times[name])
    return Phase(
        seconds=times[limit],
        device=products + other,
        host=host,
        pcie=pcie,
        limit=limit if times[limit] else "nothing",
        teraflops=sum(operation.flops * n for operation, n in found.operations.items()) / 1e12,
        gigabytes=sum(operation.bytes * n for operation, n in found.operations.items()) / 1e9,
        travelling=(found.to_device + found.to_host) / 1e9,
        launches=launches,
        syncs=found.syncs,
    )


def _rate(card: Card, operation: Operation) -> float:
    return float(getattr(card, operation.kind))


def forecast(card: Card, runs: tuple[dict[str, Seen], dict[str, Seen]], recipe: Recipe, shape: str) -> dict[str, Any]:
    """The forecast of a whole run.

    Args:
        card: the GPU.
        runs: what was seen of a model of one block, and of one of two blocks.
        recipe: the method.
        shape: of the model.
    """
    one, two = runs
    blocks, settings = SHAPES[shape], config(shape, 1)
    before = one["before"].and_again(two["before"].less(one["before"]), blocks - 1)
    state = SEQLEN * settings.hidden_size * ITEM
    kept = states_measured(recipe, SAMPLES, blocks) * state
    on_device = min(kept, card.memory // 4)
    if kept > on_device:  # written once, and read by the next block and on the way back
        before.to_host += kept - on_device
        before.to_device += 2 * (kept - on_device)
    counted = states_measured(recipe, SAMPLES, 1) * state  # in the peak that was seen with one block
    peak = max(max(found.peak for found in two.values()), one["before"].peak + on_device - counted)
    phases = {name: phase(card, two[name].less(one[name]), name == "load") for name in two if name != "before"}
    weights = phases["load"].travelling * 1e9
    write, after = files(weights, blocks, settings)
    compute = sum(found.seconds for name, found in phases.items() if name != "load")
    block = max(compute, phases["load"].seconds, write)
    start = phase(card, before, from_disk=True)
    return {
        "shape": shape,
        "recipe": recipe.name,
        "card": card.name,
        "minutes": (start.seconds + blocks * block + after) / 60,
        "before_seconds": start.seconds,
        "block_seconds": block,
        "peak_gigabytes": peak / 1e9,
        "fits": peak <= 0.95 * card.memory,
        "phases": {
            "before": asdict(start),
            **{name: asdict(found) for name, found in phases.items()},
            "write": {"seconds": write, "limit": "disk", "travelling": weights / 1e9},
            "after": {"seconds": after, "limit": "disk"},
        },
    }


def files(weights: float, blocks: int, settings: PreTrainedConfig) -> tuple[float, float]:
    """Seconds to write and hash a block of so many bytes, and to finish the checkpoint after the last one."""
    outside = 2 * settings.vocab_size * settings.hidden_size * ITEM
    write = weights / WRITE + weights / HASH
    return write, write + outside / WRITE + (blocks * weights + outside) / READ


def main() -> None:
    """Forecast everything, write the results and print their tables."""
    found: list[dict[str, Any]] = []
    for shape in SHAPES:
        for name in RECIPES:
            recipe = Recipe.load(name)
            for memory in sorted({card.memory for card in CARDS}):
                runs = tuple(seen(config(shape, blocks), recipe, SAMPLES, SEQLEN, memory) for blocks in (1, 2))
                found += [forecast(card, runs, recipe, shape) for card in CARDS if card.memory == memory]
    assumptions = {
        "products": PRODUCTS,
        "bandwidth": BANDWIDTH,
        "pcie": PCIE,
        "launch_seconds": LAUNCH,
        "shortest_seconds": SHORTEST,
        "wait_seconds": WAIT,
        "disk_read": READ,
        "disk_write": WRITE,
        "sha256": HASH,
    }
    result = {
        "note": NOTE,
        "tokens": f"{SAMPLES} × {SEQLEN}",
        "dtype": "bfloat16",
        "assumed": assumptions,
        "cards": [asdict(card) for card in CARDS],
        "forecasts": found,
    }
    RESULTS.write_text(json.dumps(_rounded(result), indent=1) + "\n", encoding="utf-8")
    print("\n".join(tables(found)))


def tables(found: list[dict[str, Any]]) -> list[str]:
    """The forecasts as lines of Markdown: whole runs, then the phases of one block on an H100."""
    lines = [NOTE, "", f"| shape | recipe | {' | '.join(card.name for card in CARDS)} | peak, H100 |"]
    lines.append("|---|---|" + "---:|" * (len(CARDS) + 1))
    for shape in SHAPES:
        for recipe in RECIPES:
            by_card = {one["card"]: one for one in found if (one["shape"], one["recipe"]) == (shape, recipe)}
            cells = [
                f"{by_card[card.name]['minutes']:.1f} min" if by_card[card.name]["fits"] else "does not fit"
                for card in CARDS
            ]
            peak = by_card[CARDS[1].name]["peak_gigabytes"]
            lines.append(f"| {shape} | {recipe} | {' | '.join(cells)} | {peak:.1f} GB |")
    lines += ["", "| shape | recipe | phase | seconds | limit | TFLOP | GB | GB travelling | launches | syncs |"]
    lines.append("|---|---|---|---:|---|---:|---:|---:|---:|---:|")
    for one in found:
        if one["card"] == CARDS[1].name:
            for name, part in one["phases"].items():
                numbers = (f"{part.get(key, 0):,.1f}" for key in ("teraflops", "gigabytes", "travelling"))
                counts = (f"{part.get(key, 0):,.0f}" for key in ("launches", "syncs"))
                cells = [f"{part['seconds']:.3f}", part["limit"], *numbers, *counts]
                lines.append(f"| {one['shape']} | {one['recipe']} | {name} | {' | '.join(cells)} |")
    return lines


def _rounded(value: Any) -> Any:
    """Numbers to four digits, in trees of JSON."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    typer.run(main)
