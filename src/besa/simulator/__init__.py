"""Simulation of an accelerator for sparse weights, from the zeros of a checkpoint.

`vitcod` counts cycles, `bandwidth` counts bytes, `model` does both for every linear of a checkpoint.
"""

from besa.simulator.model import Simulation, check_alike, described, simulate, simulate_weight
from besa.simulator.vitcod import Accelerator, Cycles, cycles

__all__ = ["Accelerator", "Cycles", "Simulation", "check_alike", "cycles", "described", "simulate", "simulate_weight"]
