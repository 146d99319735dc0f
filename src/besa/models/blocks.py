"""A block of a decoder, run without the rest of the model.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from besa.errors import BesaError
from besa.models.activations import HiddenStates
from besa.models.calls import hidden_states_of, replayed
from besa.models.prunable import Prunable, replaced
from besa.models.transfers import Outputs, fetched


@dataclass(frozen=True)
class Block:
    """One decoder block, and the arguments beside the hidden states that the model calls it with.

    Attributes:
        index: position in the decoder, from 0.
        name: module path in the model, such as ``model.layers.3``.
        module: the block itself.
        prunables: its prunable matrices by full module path, in module order.
        arguments: of its call by number of sequences and of tokens (masks, rotary embeddings), by name.
    """

    index: int
    name: str
    module: nn.Module
    prunables: dict[str, Prunable]
    arguments: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)

    def weight(self, name: str) -> Tensor:
        """The prunable matrix (O, I) of that name, as a view of the block's current weight."""
        prunable = self.prunables[name]
        return prunable.of(self.module.get_parameter(prunable.parameter))

    def __call__(
        self,
        x_NTC: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        others: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Output (N, T, C) of the block for hidden states (N, T, C).

        Args:
            x_NTC: input on the block's device.
            weights: matrices by full name that replace the block's own; gradients reach them.
            others: parameters by name within the block, such as norms, that replace its own; gradients reach them.
        """
        captured = self.arguments[x_NTC.shape[0], x_NTC.shape[1]]
        arguments = {name: replayed(value, x_NTC.device) for name, value in captured.items()}
        if weights is None and others is None:
            output: Any = self.module(x_NTC.contiguous(), **arguments)
        else:
            parameters = replaced(dict(self.module.named_parameters()), self.prunables, weights or {}) | dict(
                others or {}
            )
            output = functional_call(self.module, parameters, (x_NTC.contiguous(),), arguments)
        return hidden_states_of(output)

    def run(self, x_NTC: HiddenStates, batch: int, into: HiddenStates | None = None) -> None:
        """Run the block on all sequences, `batch` at a time on the block's device.

        Args:
            x_NTC: inputs (N, T, C); may be on another device.
            batch: sequences in a forward pass.
            into: receives the outputs, and may be `x_NTC` itself; None discards them.

        Raises:
            BesaError: an output is NaN or infinite.
        """
        send(self, self.name, x_NTC, batch, next(self.module.parameters()).device, into)


@torch.no_grad()
def send(
    function: Callable[[Tensor], Tensor],
    name: str,
    x_NTC: HiddenStates,
    batch: int,
    device: torch.device,
    into: HiddenStates | None,
) -> None:
    """Apply a function to all sequences; see `Block.run`. The host waits for the device once, at the end.

    Args:
        function: of hidden states (N, T, C).
        name: of the function, for the error message.
        x_NTC: inputs (N, T, C); may be on another device.
        batch: sequences in a forward pass.
        device: of the function.
        into: receives the outputs, and may be `x_NTC` itself; None discards them.

    Raises:
        BesaError: an output is NaN or infinite.
    """
    outputs = None if into is None else Outputs(into, device)
    extremes: list[Tensor] = []  # of every batch; they stay on the device, so that the host waits once
    for start in range(0, len(x_NTC), batch):
        part = slice(start, start + batch)
        y_NTC = function(fetched(x_NTC[part], device))
        extremes += y_NTC.aminmax()
        if outputs is not None:
            outputs.put(part, y_NTC)
    if outputs is not None:
        outputs.finish()
    if extremes and not bool(torch.stack(extremes).isfinite().all()):
        raise BesaError(
            f"The output of {name} has NaN or infinity: try --dtype float32, and check the model with `besa eval`."
        )
