"""Uniform: every block is pruned at the model's sparsity."""

from __future__ import annotations

from typing import Literal

from besa.methods.targets.targeting import Targeting


class UniformTargets(Targeting):
    """The same sparsity for every block; nothing is measured."""

    method: Literal["uniform"] = "uniform"
