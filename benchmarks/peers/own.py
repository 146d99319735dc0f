"""A run of besa beside those of other programs: python -m benchmarks.peers.own JOB."""

from __future__ import annotations

from torch import Tensor

import besa
from benchmarks.peers.measuring import Job, run
from besa.system import memory


def prune(job: Job, tokens_NT: Tensor) -> None:
    """Prune by a shipped recipe, changed as `--set` does."""
    memory.stay_lean()  # as `besa prune` does
    recipe = besa.Recipe.load(job.method, 0.5, job.settings)
    calibration = besa.Calibration(tokens_NT, "tokens", 0)
    besa.compress(job.model, recipe, calibration, out=job.out, batch=job.batch, device="cpu")


if __name__ == "__main__":
    run(prune, ("torch", "transformers"))
