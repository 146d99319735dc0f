"""What more ranks gain: measured with two processes on this machine, and forecast for GPUs.

    python -m benchmarks.scaling measured FOLDER    # one and two ranks of one thread each; results/scaling.json
    python -m benchmarks.scaling planned            # what each of 1, 2, 4 and 8 ranks has to do, keep and send
    python -m benchmarks.scaling forecast           # one, 8 and 32 ranks on H100s; results/scaling-forecast.json

They print the tables of docs/scaling.md. What ranks send is counted at every exchange, as if it went round a ring; what
really passes the loopback interface, and what all ranks read from the disk, is measured beside it.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.gpu_forecast import CARDS, SAMPLES, SEQLEN, SHAPES, files, phase
from benchmarks.random_model import config
from benchmarks.weightless import seen
from besa.api import plan
from besa.methods.recipe import Recipe
from besa.models.loading import load_model, load_tokenizer
from besa.models.source import locate
from besa.record import RECORD_NAME, RunRecord, now
from besa.system.devices import CPU
from besa.system.machine import machine, versions

RESULTS = Path(__file__).parent / "results"
BESA = ("allocation.batch=2", "allocation.crop=0.5")  # the steps that a run with more sequences takes
MEASURED: dict[str, tuple[str, ...]] = {"wanda": (), "sparsegpt": (), "fast": (), "besa": BESA}
RANKS = (1, 2)
PAGES = os.sysconf("SC_PAGE_SIZE")
app = typer.Typer(help=__doc__, add_completion=False)


@dataclass(frozen=True)
class Wire:
    """What connects ranks.

    Attributes:
        name: of the machines.
        ranks: GPUs.
        bandwidth: bytes a second that a rank sends while all send round a ring; a share of the published rate.
        latency: seconds of an exchange beside its bytes, per rank on the way.
        source: of the rate.
    """

    name: str
    ranks: int
    bandwidth: float
    latency: float
    source: str


# The shares of the published rates, and the latencies, are guesses.
WIRES = [
    Wire("1 GPU", 1, 1.0, 0.0, "nothing is sent"),
    Wire("8 GPUs, one node", 8, 0.75 * 450e9, 2e-6, "NVLink 4: 450 GB/s in each direction; NVIDIA H100 datasheet"),
    Wire("4 × 8 GPUs, 100 Gb/s", 32, 0.75 * 12.5e9, 5e-6, "a ring crosses each node's 100 Gb/s Ethernet once"),
]


@app.command()
def measured(
    folder: Annotated[Path, typer.Argument(help="Where the model and the checkpoints go; must not exist.")],
    samples: int = 16,
    seqlen: int = 512,
    rounds: int = 3,
) -> None:
    """Prune SmolLM2-135M by one rank and by two, in turn, and keep the middle of the rounds."""
    folder.mkdir(parents=True)
    source = locate("smollm2")
    model = folder / "dense"
    load_model(source, "float32").save_pretrained(model)
    load_tokenizer(source).save_pretrained(model)
    found: dict[str, Any] = {}
    for name, changes in MEASURED.items():
        runs: dict[int, list[dict[str, Any]]] = {ranks: [] for ranks in RANKS}
        for number in range(rounds):
            for ranks in RANKS:
                out = folder / f"{name}-{ranks}-{number}"
                runs[ranks].append(_run(model, out, ranks, ["--recipe", name, *_options(changes, samples, seqlen)]))
        found[name] = {str(ranks): _middle(of_ranks) for ranks, of_ranks in runs.items()}
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    result = {
        "created": now(),
        "tokens": f"{samples} × {seqlen}",
        "model": "SmolLM2-135M in float32",
        "threads": 1,
        "versions": versions(),
        "machine": machine(CPU),
        "runs": found,
    }
    (RESULTS / "scaling.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(_measured_table(found)))


def _options(changes: tuple[str, ...], samples: int, seqlen: int) -> list[str]:
    settings = [part for change in changes for part in ("--set", change)]
    return ["--samples", str(samples), "--seqlen", str(seqlen), "--batch", "2", "--device", "cpu", *settings]


def _run(model: Path, out: Path, ranks: int, options: list[str]) -> dict[str, Any]:
    """One run: seconds by phase, bytes that a rank sent for a block, and what the machine saw of it.

    That is what passed the loopback interface for a block, for each rank, and what all ranks read from the disk, as a
    share of the model's file.
    """
    weights = next(model.glob("*.safetensors"))
    with weights.open("rb") as file:  # so that the model comes from the disk
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    launcher = [] if ranks == 1 else ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    before, read = _loopback(), _read()
    subprocess.run(
        [sys.executable, "-m", *launcher, "besa", "prune", str(model), str(out), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    record = RunRecord.read(out / RECORD_NAME)
    phases: dict[str, float] = {}
    sent: dict[str, int] = {}
    for block in record.blocks:
        for name, seconds in block.phases.items():
            phases[name] = phases.get(name, 0.0) + seconds
        for name, number in block.sent.items():
            sent[name] = sent.get(name, 0) + number
    return {
        "seconds": record.seconds,
        "phases": phases,
        "sent": {name: number / len(record.blocks) for name, number in sent.items()},
        "loopback": (_loopback() - before) / len(record.blocks) / ranks,
        "read": (_read() - read) / weights.stat().st_size,
        "peak_memory": record.peak_memory_bytes,
    }


def _read() -> int:
    """Bytes that finished processes, and theirs, have read from the disk."""
    return 512 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock


def _loopback() -> int:
    """Bytes that have passed the loopback interface."""
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    return 0


def _middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The middle of each number over the rounds."""
    first = runs[0]
    return {
        key: {part: median(run[key].get(part, 0.0) for run in runs) for part in first[key]}
        if isinstance(first[key], dict)
        else median(run[key] for run in runs)
        for key in first
    }


def _measured_table(found: dict[str, Any]) -> list[str]:
    lines = [
        "| recipe | phase | 1 rank, s | 2 ranks, s | gain | sent by a rank, a block |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for recipe, runs in found.items():
        one, two = runs["1"], runs["2"]
        phases = sorted(one["phases"], key=lambda name: -one["phases"][name])
        rows = [("whole run", one["seconds"], two["seconds"], sum(two["sent"].values()))]
        rows += [(name, one["phases"][name], two["phases"][name], two["sent"].get(name, 0.0)) for name in phases]
        for name, before, after, sent in rows:
            if before >= 0.02 * one["seconds"]:
                cells = f"{before:.1f} | {after:.1f} | {before / after:.2f} | {sent / 1e6:.2f} MB"
                lines.append(f"| {recipe} | {name} | {cells} |")
    return lines


@app.command()
def planned() -> None:
    """What `besa plan --ranks` says of LLaMA-2 7B, where every rank has a GPU."""
    lines = [
        "| recipe | ranks | sequences | passes over them | GPU memory | activations of it | sent for a block |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        config("7B", SHAPES["7B"]).save_pretrained(folder)
        for name in ("wanda", "sparsegpt", "besa", "fast", "best"):
            for count in (1, 2, 4, 8):
                found = plan(folder, name, samples=SAMPLES, seqlen=SEQLEN, device="cuda", ranks=count)
                sizes = (
                    found.gpu_memory_bytes or 0,
                    found.activation_places["device"],
                    sum(found.traffic_bytes.values()),
                )
                cells = (
                    f"{found.sequences} | {found.forward_passes:.1f} | {' | '.join(f'{s / 1e9:.2f} GB' for s in sizes)}"
                )
                lines.append(f"| {name} | {count} | {cells} |")
    print("\n".join(lines))


@app.command()
def forecast() -> None:
    """Work out what ranks would take on H100s, by phase, as benchmarks/gpu_forecast.py does for one."""
    card = next(card for card in CARDS if card.name.startswith("H100"))
    found: list[dict[str, Any]] = []
    for shape, blocks in SHAPES.items():
        for name in ("wanda", "besa", "fast"):
            recipe = Recipe.load(name)
            learning = 0.0  # seconds of all steps, one after another; at each, all ranks wait for the one that has it
            for wire in WIRES:
                runs = [seen(config(shape, n), recipe, SAMPLES, SEQLEN, card.memory, wire.ranks) for n in (1, 2)]
                one, two = runs
                before = one["before"].and_again(two["before"].less(one["before"]), blocks - 1)
                start = phase(card, before, from_disk=True).seconds + _exchange(wire, before.sent, before.exchanges)
                phases, sent = {}, {}
                for part in two:
                    if part != "before":
                        each = two[part].less(one[part])
                        seconds = phase(card, each, part == "load").seconds
                        if part == "allocate" and recipe.descent is not None:
                            seconds = learning = max(learning, seconds)
                        phases[part] = seconds + _exchange(wire, each.sent, each.exchanges)
                        sent[part] = each.sent
                reading = phases.pop("load")
                write, after = files(two["load"].less(one["load"]).to_device, blocks, config(shape, 1))
                aside = max(0.0, max(reading, write) - sum(phases.values()))  # what the computation does not hide
                phases |= {"files": aside, "before": start / blocks, "seal": after / blocks}
                total = blocks * sum(phases.values())
                found.append(
                    {
                        "shape": shape,
                        "recipe": name,
                        "machines": wire.name,
                        "minutes": total / 60,
                        "phases": phases,
                        "sent": sent,
                    }
                )
                print(f"{shape} {name} {wire.name}: {total / 60:.2f} min", flush=True)
    result = {
        "note": "A forecast from counted work and published rates. Nothing of it was measured on a GPU.",
        "tokens": f"{SAMPLES} × {SEQLEN}",
        "card": asdict(card),
        "wires": [asdict(wire) for wire in WIRES],
        "forecasts": found,
    }
    (RESULTS / "scaling-forecast.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(_forecast_table(found)))


def _exchange(wire: Wire, sent: float, exchanges: int) -> float:
    """Seconds in which ranks do nothing but exchange."""
    return sent / wire.bandwidth + exchanges * wire.latency * (wire.ranks - 1)


def _forecast_table(found: list[dict[str, Any]]) -> list[str]:
    """Whole runs, the phase that takes longest with the most ranks, and phases of a block."""
    names = [wire.name for wire in WIRES]
    lines = [
        f"| shape | recipe | {' | '.join(names)} | most of the time with 32 |",
        "|---|---|" + "---:|" * len(names) + "---|",
    ]
    pairs = dict.fromkeys((one["shape"], one["recipe"]) for one in found)
    for shape, recipe in pairs:
        runs = {one["machines"]: one for one in found if (one["shape"], one["recipe"]) == (shape, recipe)}
        phases = runs[names[-1]]["phases"]
        longest = max(phases, key=lambda name: phases[name])
        share = phases[longest] / sum(phases.values())
        cells = " | ".join(f"{runs[name]['minutes']:.2f} min" for name in names)
        lines.append(f"| {shape} | {recipe} | {cells} | {longest}, {share:.0%} |")
    lines += [
        "",
        f"| shape | recipe | phase | {' | '.join(names)} | sent by a rank of 32 |",
        "|---|---|---|" + "---:|" * (len(names) + 1),
    ]
    for shape, recipe in pairs:
        runs = {one["machines"]: one for one in found if (one["shape"], one["recipe"]) == (shape, recipe)}
        for name in runs[names[0]]["phases"]:
            seconds = [runs[wire]["phases"][name] for wire in names]
            if max(seconds) >= 0.01:
                cells = " | ".join(f"{number:.3f} s" for number in seconds)
                sent = runs[names[-1]]["sent"].get(name, 0.0)
                lines.append(f"| {shape} | {recipe} | {name} | {cells} | {sent / 1e6:,.1f} MB |")
    return lines


if __name__ == "__main__":
    app()
