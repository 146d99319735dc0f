"""Fine-tuning: the kept weights of a block move together, so that its output comes closer to the dense path's.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, O rows, I columns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from besa.methods.reconstruction.written import written
from besa.models.activations import HiddenStates
from besa.models.blocks import Block
from besa.models.units import Unit
from besa.observing.losses import reconstruction_error, token_weighted_error
from besa.settings import Settings
from besa.system.machine import learning_dtype


@dataclass(frozen=True)
class Finetuned:
    """Weights (O, I) by full name, as they are to be written, and the held-out loss before and after every epoch."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)


class Finetuner(Settings):
    """Base of all ways to fine-tune; by default one that does nothing.

    Attributes:
        moves_weights: kept weights change, towards the outputs of the dense path of all tokens.
    """

    moves_weights: ClassVar[bool] = False

    @property
    def epoch_passes(self) -> float:
        """Forward passes of the calibration set that an epoch takes; a backward pass counts as two."""
        return 0.0

    @property
    def passes(self) -> float:
        """Forward passes of the calibration set that all epochs take at most."""
        return 0.0

    def bytes_per_weight(self, item: int) -> int:
        """Bytes that are kept for each weight, beside itself.

        Args:
            item: bytes of a weight of the model.
        """
        return 0

    @abstractmethod
    def tune(
        self, block: Block | Unit, names: list[str], inputs_NTC: HiddenStates, targets_NTC: HiddenStates, seed: int
    ) -> Finetuned:
        """Learn from a pruned block; the block itself is not changed.

        Args:
            block: with its pruned weights.
            names: of the matrices that may move.
            inputs_NTC: of the pruned path.
            targets_NTC: outputs of the dense path, of the same tokens.
            seed: of the order of sequences.
        """


class NoFinetuning(Finetuner):
    """Weights stay as the reconstruction left them."""

    method: Literal["none"] = "none"

    def tune(
        self, block: Block | Unit, names: list[str], inputs_NTC: HiddenStates, targets_NTC: HiddenStates, seed: int
    ) -> Finetuned:
        """Nothing moves."""
        return Finetuned()


class MaskedAdam(Finetuner):
    """Adam on the weights that are not zero, a sequence at a time, with steps that fall linearly to zero.

    Sequences that are held out tell whether an epoch helped: the best weights are kept, and an epoch that does not help
    is the last.
    """

    method: Literal["adam"] = "adam"
    epochs: int = Field(default=2, ge=1, description="passes over the calibration set, at most")
    rate: float = Field(default=1e-3, gt=0, description="first step, as a share of a matrix's root mean square")
    held_out: int = Field(default=16, ge=2, description="one sequence in so many is not learned from")
    loss: Literal["channel", "token"] = Field(
        default="token",
        description="squared error relative to each channel's norm, or weighted by a power of each token's norm",
    )
    token_power: float = Field(
        default=1.0, ge=0, le=2, description="tokens weigh 1 / norm to this power: 0 is the plain squared error"
    )
    autocast: bool = Field(
        default=True, description="multiply in bfloat16 while learning, where a float32 run is faster with it"
    )
    moves_weights: ClassVar[bool] = True

    @property
    def epoch_passes(self) -> float:
        """Forward and back over what is learned from, and a look at what is held out."""
        held = 1 / self.held_out
        return 3 * (1 - held) + held

    @property
    def passes(self) -> float:
        """All epochs, and a look at what is held out before the first."""
        return self.epochs * self.epoch_passes + 1 / self.held_out

    def bytes_per_weight(self, item: int) -> int:
        """Weight, gradient, two moments and the best so far as float32, the mask, copies to multiply with."""
        return 21 + item + 2

    def tune(
        self, block: Block | Unit, names: list[str], inputs_NTC: HiddenStates, targets_NTC: HiddenStates, seed: int
    ) -> Finetuned:
        """The weights of the epoch that served what is held out best."""
        if not names:
            return Finetuned()
        before = {name: block.weight(name).detach() for name in names}
        leaves = {name: w_OI.float().clone().requires_grad_() for name, w_OI in before.items()}
        kept = {name: w_OI != 0 for name, w_OI in before.items()}
        held, learned = self._parted(len(inputs_NTC))
        steps = self.epochs * len(learned)
        groups = [{"params": [leaf], "lr": self.rate * _root_mean_square(leaf)} for leaf in leaves.values()]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        generator = torch.Generator().manual_seed(seed)
        losses = [self._mean_loss(block, leaves, inputs_NTC, targets_NTC, held)]
        best = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        for _ in range(self.epochs):
            order = learned[torch.randperm(len(learned), generator=generator)]
            for chosen_N in order.split(1):
                self._loss(block, leaves, inputs_NTC[chosen_N], targets_NTC[chosen_N]).backward()
                for name, leaf in leaves.items():
                    if leaf.grad is not None:  # None: an expert that no token of these sequences reached
                        leaf.grad.masked_fill_(~kept[name], 0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            losses.append(self._mean_loss(block, leaves, inputs_NTC, targets_NTC, held))
            if not losses[-1] < min(losses[:-1]):
                break
            for name, leaf in leaves.items():
                best[name].copy_(leaf.detach())
        weights = {name: written(w_OI, kept[name], before[name].dtype) for name, w_OI in best.items()}
        return Finetuned(weights, losses)

    def _parted(self, samples: int) -> tuple[Tensor, Tensor]:
        """Sequences to hold out and to learn from; of a single sequence both."""
        places = torch.arange(samples)
        held = places % self.held_out == 0
        return (places[held], places[~held]) if samples > 1 else (places, places)

    def _mean_loss(
        self,
        block: Block | Unit,
        weights: Mapping[str, Tensor],
        inputs_NTC: HiddenStates,
        targets_NTC: HiddenStates,
        places: Tensor,
    ) -> float:
        with torch.no_grad():
            losses = [self._loss(block, weights, inputs_NTC[n], targets_NTC[n]) for n in places.split(1)]
        return float(torch.stack(losses).mean())

    def _loss(self, block: Block | Unit, weights: Mapping[str, Tensor], x_NTC: Tensor, target_NTC: Tensor) -> Tensor:
        """Of the block with these float32 weights."""
        stored = block.weight(next(iter(weights)))
        dtype = learning_dtype(stored.dtype, stored.device) if self.autocast else stored.dtype
        with torch.autocast(stored.device.type, dtype, enabled=dtype != stored.dtype):
            y_NTC = block(x_NTC.to(stored.device), {name: w_OI.to(stored.dtype) for name, w_OI in weights.items()})
        target_NTC = target_NTC.to(stored.device)
        if self.loss == "channel":
            return reconstruction_error(y_NTC, target_NTC)
        return token_weighted_error(y_NTC, target_NTC, self.token_power)


def _root_mean_square(w_OI: Tensor) -> float:
    """Of the weights that are not zero."""
    w_OI = w_OI.detach()
    return float((w_OI.square().sum() / (w_OI != 0).sum().clamp_min(1)).sqrt())


Finetuning = Annotated[NoFinetuning | MaskedAdam, Field(discriminator="method")]
