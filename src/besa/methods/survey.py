"""The dense model as methods measure it before anything is pruned.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from besa.data.calibration import Calibration
from besa.models.activations import HiddenStates, Room
from besa.models.blocks import Block
from besa.models.couplings import Coupling
from besa.models.ends import embedded
from besa.models.streaming import Decoder
from besa.progress import Progress, silent
from besa.system.ranks import Share

if TYPE_CHECKING:
    from besa.methods.fisher import LossGradients


def one_in(samples: int, sequences: int) -> int:
    """One calibration sequence in how many is measured, so that at least `sequences` are, if there are so many."""
    return max(1, samples // sequences)


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
        structures: that go whole, by block; none where weights go one by one.
        progress: has a note on each block, and none that is done.
        gradients: of the loss, by how many sequences there are to one that they are measured on; each is measured once.
    """

    decoder: Decoder
    calibration: Calibration
    names: list[tuple[str, ...]]
    sparsity: float
    batch: int
    device: torch.device
    room: Room
    seed: int
    structures: list[list[Coupling]]
    progress: Progress = silent
    gradients: dict[int, LossGradients] = field(default_factory=dict)

    @cached_property
    def sizes(self) -> list[int]:
        """The number of weights of each block that share the sparsity."""
        blocks = zip(self.decoder.blocks, self.names, strict=True)
        return [sum(block.prunables[name].numel for name in names) for block, names in blocks]

    @contextmanager
    def opened(self, block: Block, step: int = 1) -> Iterator[None]:
        """While open, a block has its weights on the device, and the block `step` further is on its way there."""
        blocks, following = self.decoder.blocks, block.index + step
        self.progress(0, len(blocks), f"measuring the dense model, {block.name}")
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
