"""What a run of besa and of another program is measured by alike: a plain forward pass, seconds, memory.

Each run is a process of its own, in which nothing of the other is loaded. So this module imports nothing of besa.

Shape suffixes: N sequences, T tokens of a sequence.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

PEAK = "VmHWM:"  # of /proc/self/status, in kB
RESET = "5"  # written to /proc/self/clear_refs: the peak begins anew


@dataclass(frozen=True)
class Job:
    """A folder to prune.

    Attributes:
        model: folder of the dense model.
        tokens: file of the calibration sequences.
        out: folder to write.
        batch: sequences in a forward pass.
        method: its name in the program that runs.
        settings: of the method.
    """

    model: str
    tokens: str
    out: str
    batch: int
    method: str
    settings: Any


def run(prune: Callable[[Job, Tensor], None], packages: Sequence[str]) -> None:
    """Do the job of the file on the command line, and write what it took beside it, as .done.

    A forward pass is of all calibration sequences, in batches, through the dense model without its head. Loading and
    writing count for the run. Peak memory is the largest resident size from the run's beginning.

    Args:
        prune: writes the pruned model of a job, given its sequences (N, T).
        packages: whose versions decide the outcome.
    """
    path = Path(sys.argv[1])
    job = Job(**json.loads(path.read_text(encoding="utf-8")))
    tokens_NT = load_file(job.tokens)["tokens"]
    forward = _forward(job, tokens_NT)
    Path("/proc/self/clear_refs").write_text(RESET, encoding="ascii")
    whole = _taken(lambda: prune(job, tokens_NT))
    result = {
        "passes": whole["processor"] / forward["processor"],
        "seconds": {"forward": forward, "whole": whole},
        "peak_memory_bytes": _peak_bytes(),
        "versions": {name: version(name) for name in packages},
    }
    path.with_suffix(".done").write_text(json.dumps(result), encoding="utf-8")


@torch.no_grad()
def _forward(job: Job, tokens_NT: Tensor) -> dict[str, float]:
    """Seconds of a forward pass, by one of its batches; the same batch before does not count."""
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto").base_model
    part_NT = tokens_NT[: job.batch]
    model(input_ids=part_NT, use_cache=False)
    taken = _taken(lambda: model(input_ids=part_NT, use_cache=False))
    return {kind: seconds * len(tokens_NT) / len(part_NT) for kind, seconds in taken.items()}


def _taken(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of a work, by the clock and of the processor, which others may have had meanwhile."""
    began, worked = time.perf_counter(), time.process_time()
    work()
    return {"clock": time.perf_counter() - began, "processor": time.process_time() - worked}


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(PEAK))
