"""What the experts of a block add to the tokens that they get, observed while the block runs.

The contribution of an expert to a token is what the mixture adds up: its output times its gate, or its output for the
gated input, as the family has it.

Shape suffixes: T tokens, E experts, P pairs of a token and an expert that the router chose for it, K experts chosen for
a token, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from besa.counting.precision import widest
from besa.errors import BesaError
from besa.models.blocks import Block
from besa.models.mixtures import Mixture
from besa.system import ranks

Pairs = tuple[Tensor, Tensor]  # the experts (P,) and what they add (P, C)


@dataclass
class Contributions:
    """Sums over the tokens that each expert of a mixture got.

    Sums of a forward pass are rounded to float32 and then added up in the widest numbers of the device, as those of
    `InputStatistics` are.

    Attributes:
        norms_E: Σ gate · ‖output‖₂.
        tokens_E: number of tokens, int64.
    """

    norms_E: Tensor
    tokens_E: Tensor

    def add(self, experts_P: Tensor, added_PC: Tensor) -> None:
        """Add the pairs of a forward pass."""
        norms_P = added_PC.float().norm(dim=1).to(self.norms_E.dtype)
        chosen_PE = experts_P[:, None] == torch.arange(len(self.tokens_E), device=experts_P.device)
        self.norms_E += (norms_P[:, None] * chosen_PE).sum(dim=0).float()  # in an order that is always the same
        self.tokens_E += chosen_PE.sum(dim=0)

    def settle(self) -> None:
        """Add up the sums of all ranks."""
        ranks.total(self.norms_E)
        ranks.total(self.tokens_E)


@contextmanager
def contributions(block: Block, mixtures: Sequence[Mixture]) -> Iterator[dict[str, Contributions]]:
    """While open, add up the contributions in every forward pass through a block, by name of the mixture.

    Args:
        block: with its weights.
        mixtures: of the block.
    """
    device = next(block.module.parameters()).device
    found = {}
    with ExitStack() as stack:
        for mixture in mixtures:
            one = found[mixture.name] = Contributions(
                torch.zeros(mixture.experts, dtype=widest(device), device=device),
                torch.zeros(mixture.experts, dtype=torch.int64, device=device),
            )
            for hook in _Watched(block, mixture, one.add).hooks():
                stack.callback(hook.remove)
        yield found
    for one in found.values():
        one.settle()


class _Watched:
    """The calls of the experts of a mixture, in one of three forms.

    Args:
        block: of the mixture.
        mixture: to watch.
        receive: is called with the pairs of a forward pass.
    """

    def __init__(self, block: Block, mixture: Mixture, receive: Callable[[Tensor, Tensor], None]) -> None:
        self._mixture, self._receive = mixture, receive
        self._owner = block.module.get_submodule(mixture.name[len(block.name) + 1 :])
        self._last = block.module.get_submodule(mixture.holders[-1][len(block.name) + 1 :])
        self._gates: list[Tensor] = []  # one-dimensional, of the router's last call

    def hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Hooks that watch."""
        for part in self._owner.children():
            if part is not self._last:
                yield part.register_forward_hook(self._see_gates)
        yield self._last.register_forward_hook(self._see, with_kwargs=True)

    def _see_gates(self, _: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, tuple):
            self._gates = [x for x in output if isinstance(x, Tensor) and x.dim() == 1 and x.is_floating_point()]

    def _see(self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        pairs = self._pairs(module, [*inputs, *keywords.values()], output)
        if pairs is None:
            raise BesaError(
                f"besa cannot see the gates of {self._mixture.holders[-1]}, so it cannot tell which experts matter: "
                "leave out experts.method."
            )
        self._receive(*pairs)

    def _pairs(self, module: nn.Module, given: list[Any], output: Tensor) -> Pairs | None:
        """The pairs of a call of the experts; None for a form that is not known."""
        experts = self._mixture.experts
        match given:
            case [Tensor() as x_TC, Tensor() as chosen_TK, Tensor() as gates_TK] if chosen_TK.shape == gates_TK.shape:
                # A token for each pair, so that nothing is added up over the experts of a token.
                x_PC, chosen_P1 = x_TC.repeat_interleave(chosen_TK.shape[1], dim=0), chosen_TK.reshape(-1, 1)
                return chosen_P1[:, 0], module.forward(x_PC, chosen_P1, gates_TK.reshape(-1, 1))
            case [Tensor(), list() as sizes] if len(sizes) == experts and self._gates:
                # Sorted by expert, with the gates in the same order (JetMoE).
                chosen_P = torch.arange(experts, device=output.device).repeat_interleave(
                    torch.tensor(sizes, device=output.device)
                )
                return chosen_P, output * self._gates[-1][:, None]
            case [Tensor() as x] if len(x) % experts == 0 and output.shape == x.shape:
                # All tokens for each expert, zeros if they are not for it (Llama 4).
                chosen_P = (x != 0).any(dim=1).nonzero()[:, 0]
                return chosen_P // (len(x) // experts), output[chosen_P]
        return None
