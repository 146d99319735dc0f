"""Uniform: every block is pruned at the model's sparsity."""

from __future__ import annotations

from typing import Literal

from besa.methods.targets.targeting import Targeting


class UniformTargets(Targeting):
    """Every block has the sparsity of the model; nothing is measured."""

    method: Literal["uniform"] = "uniform"
