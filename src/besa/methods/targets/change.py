"""Change: how far a layer turns the hidden states that pass through it (ShortGPT; Men et al., 2024, arXiv 2403.03853).

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from besa.counting.precision import widest
from besa.methods.survey import Survey
from besa.methods.targets.measuring import Measuring
from besa.models.activations import HiddenStates
from besa.models.blocks import send
from besa.models.layers import Layers, layer, without
from besa.models.transfers import fetched
from besa.system import ranks


class Change(Measuring):
    """One minus the cosine of what enters and leaves a layer, mean over tokens, as in ShortGPT (Men et al., 2024).

    The allocation `depth` takes the layers that change least. What enters the MLP is the block's output without it.
    """

    layers: Layers = "both"

    @property
    def forwards(self) -> int:
        """One, and one more where a layer is half of a block."""
        return 1 if self.layers == "both" else 2

    @property
    def paths(self) -> int:
        """The inputs and the outputs of one block, and what is between its layers."""
        return 2 if self.layers == "both" else 3

    def every(self, samples: int) -> int:
        """All are measured."""
        return 1

    def targets(self, measured: list[float], sizes: list[int], sparsity: float) -> list[float]:
        """The changes themselves: the allocation knows how many layers go."""
        return measured

    def measure(self, survey: Survey) -> list[float]:
        """The change of each block, from a forward pass of the dense model; infinite if a matrix of it is skipped."""
        tokens_NT, changes = survey.calibration.tokens_NT, []
        x_NTC = survey.embedded(tokens_NT)
        y_NTC = survey.room.empty_like(x_NTC)
        between_NTC = y_NTC if self.layers == "both" else survey.room.empty_like(x_NTC)
        for block, names in zip(survey.decoder.blocks, survey.names, strict=True):
            own = layer(block, self.layers)
            with survey.opened(block):
                block.run(x_NTC, survey.batch, into=y_NTC)
                if self.layers != "both":
                    attended = partial(without, block, layer(block, "mlp"))
                    send(attended, block.name, x_NTC, survey.batch, survey.device, into=between_NTC)
                enters_NTC = between_NTC if self.layers == "mlp" else x_NTC
                leaves_NTC = between_NTC if self.layers == "attention" else y_NTC
                change = _mean(enters_NTC, leaves_NTC, survey.device)
            changes.append(change if set(own) <= set(names) else math.inf)
            x_NTC, y_NTC = y_NTC, x_NTC
            if self.layers == "both":
                between_NTC = y_NTC
        return changes


def _mean(x_NTC: HiddenStates, y_NTC: HiddenStates, device: torch.device) -> float:
    """One minus the cosine of each token's two vectors, mean over the tokens of all ranks."""
    sums = []
    for n in range(len(x_NTC)):
        x_TC, y_TC = (fetched(each[n : n + 1], device)[0].to(widest(device)) for each in (x_NTC, y_NTC))
        sums.append(_change(x_TC, y_TC).sum())
    of_ranks = ranks.all_of(torch.stack(sums).tolist() if sums else [])
    sequences = [each for of_rank in of_ranks for each in of_rank]
    return math.fsum(sequences) / (len(sequences) * x_NTC.shape[1])


def _change(x_TC: Tensor, y_TC: Tensor) -> Tensor:
    """One minus the cosine (T,); a vector of zeros has the cosine one with itself, and zero with others."""
    lengths_T = x_TC.norm(dim=1) * y_TC.norm(dim=1)
    cosine_T = (x_TC * y_TC).sum(dim=1) / lengths_T.clamp_min(torch.finfo(x_TC.dtype).tiny)
    return torch.where((x_TC == y_TC).all(dim=1), 0, 1 - cosine_T)
