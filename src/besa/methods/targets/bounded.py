"""What methods that tell blocks apart have in common: what they look at, and how far they may go.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, B blocks.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from besa.data.calibration import Calibration
from besa.methods.targets.targeting import Targeting
from besa.models.activations import HiddenStates, allocate
from besa.models.blocks import capture_inputs
from besa.models.streaming import Decoder


@dataclass(frozen=True)
class Survey:
    """A dense model to look at before it is pruned.

    Attributes:
        decoder: the model.
        calibration: token ids (N, T).
        names: of the matrices that share the model's sparsity, by block.
        sparsity: that they are to have together.
        batch: sequences in a forward pass.
        device: where blocks are computed.
        activation_budget: bytes of hidden states kept in memory.
        folder: where more of them go.
        seed: of whatever is drawn.
    """

    decoder: Decoder
    calibration: Calibration
    names: list[tuple[str, ...]]
    sparsity: float
    batch: int
    device: torch.device
    activation_budget: int
    folder: Path | None
    seed: int

    @cached_property
    def sizes(self) -> list[int]:
        """How many weights of each block share the sparsity."""
        blocks = zip(self.decoder.blocks, self.names, strict=True)
        return [sum(block.prunables[name].numel for name in own) for block, own in blocks]

    def embedded(self, tokens_NT: Tensor) -> Tensor:
        """What reaches the first block (N, T, C)."""
        with self.decoder.embeddings():
            return torch.cat(list(capture_inputs(self.decoder.model, self.decoder.blocks, tokens_NT, self.batch)))

    def room_like(self, x_NTC: Tensor, share: int) -> HiddenStates:
        """Room for as many hidden states again, which may take one of so many parts of the memory for them."""
        samples, tokens, width = x_NTC.shape
        return allocate((samples, tokens, width), x_NTC.dtype, self.activation_budget // share, self.folder)


class Bounded(Targeting):
    """Blocks may differ in sparsity, each within bounds that follow the model's."""

    every: int = Field(default=8, ge=1, description="one calibration sequence in so many is looked at")
    least_pruned: float = Field(
        default=0.6,
        ge=0,
        le=1,
        description="of what a block would lose at the model's sparsity it loses this share at least",
    )
    least_kept: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="of what a block would keep at the model's sparsity it keeps this share at least",
    )

    @property
    def measuring(self) -> Bounded:
        """Itself."""
        return self

    @property
    def passes(self) -> float:
        """A forward pass over the sequences that are looked at."""
        return 1 / self.every

    @abstractmethod
    def measure(self, survey: Survey) -> list[float]:
        """The sparsity that each block wants, from a look at the dense model; `bounded` makes targets of them.

        Args:
            survey: whose model is looked at.

        Raises:
            BesaError: there are too few sequences.
        """

    def bounded(self, wanted: list[float], sizes: list[int], sparsity: float) -> list[float]:
        """The sparsity of each block: `wanted`, all shifted by the same, within the bounds, `sparsity` in the mean.

        Args:
            wanted: any real numbers.
            sizes: weights of each block.
            sparsity: of all.
        """
        low, high = self.least_pruned * sparsity, 1 - self.least_kept * (1 - sparsity)
        wanted_B = torch.tensor(wanted, dtype=torch.float64)
        share_B = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)

        def at(shift: float) -> Tensor:
            return (wanted_B + shift).clamp(low, high)

        least, most = low - float(wanted_B.max()), high - float(wanted_B.min())
        for _ in range(60):
            middle = (least + most) / 2
            least, most = (middle, most) if float(at(middle) @ share_B) < sparsity else (least, middle)
        rates: list[float] = at((least + most) / 2).tolist()
        return rates

    def tokens(self, survey: Survey) -> Tensor:
        """The sequences (n, T) that are looked at."""
        return survey.calibration.tokens_NT[:: self.every]
