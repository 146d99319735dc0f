"""besa: prune large language models block by block, with learned and exact sparsity."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from besa.errors import BesaError
from besa.version import __version__
from besa_hook import install

# Torch reads this once, when it first takes memory. Linux then backs large tensors with pages of 2 MiB, if the system
# lets programs ask for them. No number changes.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from besa.api import Compressed, compress, evaluate, plan, simulate
    from besa.checkpoint.packing import pack, unpack
    from besa.checkpoint.shrinking import shrink
    from besa.checkpoint.verification import verify
    from besa.cli.tracking import show_progress
    from besa.data.calibration import Calibration
    from besa.evaluation.result import Evaluation
    from besa.integrations.pushing import push
    from besa.integrations.training import KeepMasks, keep_masks
    from besa.methods.recipe import Recipe
    from besa.runtime.generation import generate
    from besa.runtime.sparse_models import load
    from besa.runtime.speed import bench
    from besa.simulator import Accelerator, Simulation

__all__ = [
    "Accelerator",
    "BesaError",
    "Calibration",
    "Compressed",
    "Evaluation",
    "KeepMasks",
    "Recipe",
    "Simulation",
    "__version__",
    "bench",
    "compress",
    "evaluate",
    "generate",
    "keep_masks",
    "load",
    "pack",
    "plan",
    "push",
    "show_progress",
    "shrink",
    "simulate",
    "unpack",
    "verify",
]

_HOMES = {
    "Accelerator": "besa.simulator",
    "Calibration": "besa.data.calibration",
    "Compressed": "besa.api",
    "Evaluation": "besa.evaluation.result",
    "KeepMasks": "besa.integrations.training",
    "Recipe": "besa.methods.recipe",
    "Simulation": "besa.simulator",
    "bench": "besa.runtime.speed",
    "compress": "besa.api",
    "evaluate": "besa.api",
    "generate": "besa.runtime.generation",
    "keep_masks": "besa.integrations.training",
    "load": "besa.runtime.sparse_models",
    "pack": "besa.checkpoint.packing",
    "plan": "besa.api",
    "push": "besa.integrations.pushing",
    "show_progress": "besa.cli.tracking",
    "shrink": "besa.checkpoint.shrinking",
    "simulate": "besa.api",
    "unpack": "besa.checkpoint.packing",
    "verify": "besa.checkpoint.verification",
}


install()


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `besa --help` should not wait for torch and transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module 'besa' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
