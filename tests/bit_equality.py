"""Whether a change that should change nothing changed nothing: every recipe on the tiny Llama, to the bit.

    python -m tests.bit_equality make before.json      # on the state before
    python -m tests.bit_equality compare before.json   # on the state after

What is compared of each recipe: the tensors that are written, the decisions in the record, and the report.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import besa
from besa.methods.shipped import shipped
from besa.record import RECORD_NAME
from besa.report import load_run, render

ASSETS = Path(__file__).parent / "assets"
TINY = Path("tiny-llama")  # named without a path, as records have names
SETTINGS: dict[str, Any] = {
    "calibration": str(TINY / "calibration.txt"),
    "samples": 6,
    "seqlen": 32,
    "seed": 0,
    "device": "cpu",
}
# What differs between two runs that decide alike, by the value that takes its place.
VOLATILE: dict[str, Any] = {
    "created": "2000-01-01T00:00:00+00:00",
    "seconds": 1.0,
    "phases": {},
    "peak_memory_bytes": 1,
    "versions": {},
    "machine": {},
    RECORD_NAME: "",  # the record's own digest, of what it was before this
}
VARIANTS = {  # of recipes, for what none of the shipped ones does
    "besa-layer-pruned-teacher": ("besa", ["allocation.rates=layer", "allocation.teacher=pruned"]),
    "besa-two-blocks": ("besa", ["allocation.granularity=two-blocks"]),
    "besa-attn-mlp": ("besa", ["allocation.granularity=attn-mlp"]),
    "2-of-4": ("wanda", ["allocation.method=nm"]),
    "structured": ("wanda", ["allocation.method=structured"]),
    "owl": ("sparsegpt", ["targets.method=owl"]),
}


def digests(folder: Path) -> dict[str, dict[str, str]]:
    """Digests by recipe of its tensors, its record and its report; runs are made in `folder`."""
    recipes = {name: besa.Recipe.load(name) for name in shipped()}
    recipes |= {name: besa.Recipe.load(base, overrides=changes) for name, (base, changes) in VARIANTS.items()}
    found = {}
    for name, recipe in recipes.items():
        out = folder / name
        besa.compress(TINY, recipe, out=out, **SETTINGS)
        record = steady(json.loads((out / RECORD_NAME).read_text()))
        (out / RECORD_NAME).write_text(json.dumps(record))
        parts = {
            "tensors": b"".join(path.read_bytes() for path in sorted(out.glob("*.safetensors"))),
            "record": json.dumps(record, sort_keys=True).encode(),
            "report": render([load_run(out)]).encode(),
        }
        found[name] = {part: hashlib.sha256(content).hexdigest() for part, content in parts.items()}
        print(f"{name}: {' '.join(f'{part} {digest[:12]}' for part, digest in found[name].items())}", flush=True)
    return found


def steady(value: Any) -> Any:
    """A record without what differs between two runs that decide alike."""
    if isinstance(value, dict):
        return {key: VOLATILE[key] if key in VOLATILE else steady(own) for key, own in value.items()}
    return [steady(own) for own in value] if isinstance(value, list) else value


def main(command: str, file: str) -> int:
    """Make the digests, or compare with them; the exit code."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(ASSETS):
        found = digests(Path(scratch))
    if command == "make":
        Path(file).write_text(json.dumps(found, indent=2) + "\n")
        return 0
    before = json.loads(Path(file).read_text())
    differing = [
        f"{name}: {part}"
        for name in sorted(before.keys() | found.keys())
        for part in ("tensors", "record", "report")
        if before.get(name, {}).get(part) != found.get(name, {}).get(part)
    ]
    print("\n".join(["differ:", *differing]) if differing else f"equal to the bit: {len(found)} recipes")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
