"""The error of a block's output against its target.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from besa.counting.precision import widest
from besa.models.activations import HiddenStates
from besa.models.transfers import fetched
from besa.system import ranks
from besa.system.ranks import Share


def reconstruction_error(y_NTC: Tensor, target_NTC: Tensor, plain: float = 0.0) -> Tensor:
    """Mean over channels of ‖y − target‖² / ‖target‖² (scalar, float32): the first term of eq. 1, made scale-free.

    Each channel is measured against its own norm over sequences and tokens. The few channels with massive activations
    therefore do not dominate the loss, and one penalty weight fits every block and model.

    Args:
        y_NTC: outputs of a block.
        target_NTC: targets of these.
        plain: share of the plain squared error ‖y − target‖² / ‖target‖² over all channels, which these few dominate.
    """
    error_C, norm_C = _squares(y_NTC, target_NTC)
    relative = _relative(error_C, norm_C)
    return relative if not plain else (1 - plain) * relative + plain * error_C.sum() / norm_C.sum().clamp_min(1e-12)


def token_weighted_error(y_NTC: Tensor, target_NTC: Tensor, power: float) -> Tensor:
    """Σ_t ‖y_t − target_t‖² / ‖target_t‖^power, relative to the same sum of ‖target_t‖² (scalar, float32).

    With power 0, a few tokens with massive activations dominate it. With power 2, all tokens count equally. A token
    whose target is zero weighs 1.
    """
    squares_NT = target_NTC.float().square().sum(dim=-1)
    weights_NT = torch.where(squares_NT > 0, squares_NT.pow(-power / 2), 1.0)
    error_NT = (y_NTC.float() - target_NTC.float()).square().sum(dim=-1)
    return (error_NT * weights_NT).sum() / (squares_NT * weights_NT).sum().clamp_min(1e-12)


def error_between(
    y_NTC: HiddenStates, target_NTC: HiddenStates, share: Share, every: int, tokens: int, device: torch.device
) -> Tensor:
    """`reconstruction_error` (scalar) of the first tokens of every so many-th sequence, over all ranks.

    Args:
        y_NTC: outputs of the share's N sequences.
        target_NTC: targets of all N or only of those that are measured; of each, at least the first `tokens` tokens.
        share: the sequences of this rank.
        every: one sequence in so many is measured; at least 1.
        tokens: of a sequence, from its beginning.
        device: that computes; the hidden states may be elsewhere.
    """
    all_there = len(target_NTC) == len(y_NTC)
    sums_2C = torch.zeros(2, y_NTC.shape[-1], dtype=widest(device), device=device)
    for at, place in enumerate(share.own(share.every(every))):
        target_at = place if all_there else at
        y, target = (
            fetched(x_NTC[start : start + 1][:, :tokens], device)
            for x_NTC, start in ((y_NTC, place), (target_NTC, target_at))
        )
        sums_2C += torch.stack(_squares(y, target))  # one sequence at a time
    error_C, norm_C = ranks.total(sums_2C).float()
    return _relative(error_C, norm_C)


def _squares(y_NTC: Tensor, target_NTC: Tensor) -> tuple[Tensor, Tensor]:
    """‖y − target‖² and ‖target‖² of each channel (C,), float32."""
    error_C = (y_NTC.float() - target_NTC.float()).square().sum(dim=(0, 1))
    return error_C, target_NTC.float().square().sum(dim=(0, 1))


def _relative(error_C: Tensor, norm_C: Tensor) -> Tensor:
    return (error_C / norm_C.clamp_min(1e-12)).mean()
