"""Simulation of an accelerator for sparse weights, on the numbers of a checkpoint; no accelerator is needed.

`vitcod` counts cycles, `memory` counts bytes, `model` does both for every linear of a checkpoint.
"""

from besa.simulator.model import Simulation, check_alike, described, simulate, simulate_weight
from besa.simulator.vitcod import Accelerator, Cycles, cycles

__all__ = ["Accelerator", "Cycles", "Simulation", "check_alike", "cycles", "described", "simulate", "simulate_weight"]
