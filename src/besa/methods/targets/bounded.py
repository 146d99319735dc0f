"""What the methods that measure blocks have in common: the model that they measure, and bounds on the result.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, B blocks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from pydantic import Field
from torch import Tensor

from besa.data.calibration import Calibration
from besa.methods.targets.targeting import Targeting
from besa.models.activations import HiddenStates, Room
from besa.models.blocks import Block, embedded
from besa.models.streaming import Decoder
from besa.system.ranks import Share


@dataclass(frozen=True)
class Survey:
    """A dense model to measure before it is pruned.

    Attributes:
        decoder: the model.
        calibration: token ids (N, T).
        names: full names of the matrices that share the model's sparsity, by block.
        sparsity: of these matrices together.
        batch: sequences in a forward pass.
        device: where blocks are computed.
        room: for hidden states.
        seed: of random choices.
    """

    decoder: Decoder
    calibration: Calibration
    names: list[tuple[str, ...]]
    sparsity: float
    batch: int
    device: torch.device
    room: Room
    seed: int

    @cached_property
    def sizes(self) -> list[int]:
        """The number of weights of each block that share the sparsity."""
        blocks = zip(self.decoder.blocks, self.names, strict=True)
        return [sum(block.prunables[name].numel for name in names) for block, names in blocks]

    @contextmanager
    def opened(self, block: Block, step: int = 1) -> Iterator[None]:
        """While open, a block has its weights on the device, and the block `step` further is on its way there."""
        blocks, following = self.decoder.blocks, block.index + step
        with self.decoder.opened(block, self.device):
            if 0 <= following < len(blocks):
                self.decoder.prefetch(blocks[following], self.device)
            yield

    def share(self, tokens_NT: Tensor) -> Share:
        """Which of these sequences this rank measures."""
        return Share.of(len(tokens_NT), self.batch)

    def embedded(self, tokens_NT: Tensor) -> HiddenStates:
        """The inputs of the first block (n, T, C), for the sequences of this rank."""
        with self.decoder.embeddings(self.device):
            return embedded(
                self.decoder.model, self.decoder.blocks, tokens_NT, self.batch, self.room, self.share(tokens_NT)
            )


class Bounded(Targeting):
    """Blocks may differ in sparsity, each within bounds around the sparsity of the model."""

    every: int = Field(default=8, ge=1, description="one calibration sequence in so many is measured")
    least_pruned: float = Field(
        default=0.6,
        ge=0,
        le=1,
        description="lower bound of a block's sparsity, as a share of the model's sparsity",
    )
    least_kept: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="lower bound of a block's density, as a share of the model's density",
    )

    @property
    def measuring(self) -> Bounded:
        """The method itself."""
        return self

    @property
    def passes(self) -> float:
        """A forward pass over the measured sequences."""
        return 1 / self.every

    @abstractmethod
    def measure(self, survey: Survey) -> list[float]:
        """A sparsity for each block, measured on the dense model; `bounded` makes targets of them.

        Args:
            survey: the model.

        Raises:
            BesaError: there are too few sequences.
        """

    def bounded(self, measured: list[float], sizes: list[int], sparsity: float) -> list[float]:
        """The target of each block: one shift of all measured sparsities, clamped to the bounds, gives the right mean.

        Args:
            measured: a sparsity for each block, any real number.
            sizes: weights of each block.
            sparsity: of all blocks together.
        """
        low, high = self.least_pruned * sparsity, 1 - self.least_kept * (1 - sparsity)
        measured_B = torch.tensor(measured, dtype=torch.float64)
        share_B = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)

        def at(shift: float) -> Tensor:
            return (measured_B + shift).clamp(low, high)

        least, most = low - float(measured_B.max()), high - float(measured_B.min())
        for _ in range(60):
            middle = (least + most) / 2
            least, most = (middle, most) if float(at(middle) @ share_B) < sparsity else (least, middle)
        rates: list[float] = at((least + most) / 2).tolist()
        return rates

    def tokens(self, survey: Survey) -> Tensor:
        """The measured sequences (n, T)."""
        return survey.calibration.tokens_NT[:: self.every]
