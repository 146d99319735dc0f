"""Decide by a score of your own which weights go first.

python examples/own_importance.py [MODEL] [TEXT]

The score here is Wanda's times a random factor near one. `spread` says how far from one, so you can see how much
noise the order of the weights bears. To add a score to besa itself, so that recipes know its name: CONTRIBUTING.md.
"""

import sys
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

import besa
from besa.methods.importance.criterion import Criterion
from besa.observing.input_statistics import InputStatistics


class Noisy(Criterion):
    """Importance |W| · ‖x‖₂ · exp(spread · noise), with normal noise."""

    method: Literal["noisy"] = "noisy"
    spread: float = Field(default=0.1, ge=0, description="standard deviation of the factor's logarithm")

    def score(self, w_OI: Tensor, statistics: InputStatistics) -> Tensor:
        """Importance (O, I), float32; the lowest are pruned first."""
        norms_I = statistics.squares_I.sqrt().float()
        noise_OI = torch.randn(w_OI.shape, generator=torch.Generator().manual_seed(0)).to(w_OI.device)
        return w_OI.float().abs() * norms_I * (self.spread * noise_OI).exp()


class NoisyRecipe(besa.Recipe):
    """A recipe that knows this importance alone; its other stages are those of any recipe."""

    importance: Noisy = Noisy()


def main(model: str = "smollm2", text: str = "c4", seqlen: int = 512) -> list[float]:
    """Prune with more and more noise; returns the mean error of the blocks for each."""
    errors = []
    for spread in (0.0, 0.5, 2.0):
        recipe = NoisyRecipe(name="noisy", importance=Noisy(spread=spread))
        blocks = besa.compress(model, recipe, text, samples=8, seqlen=seqlen).record.blocks
        errors.append(sum(block.reconstruction_error for block in blocks) / len(blocks))
        print(f"spread {spread}: mean error of the blocks {errors[-1]:.4f}")
    return errors


if __name__ == "__main__":
    main(*sys.argv[1:])
