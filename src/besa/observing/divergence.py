"""How far the predictions of a pruned model are from those of the dense one, over a large vocabulary.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LOGITS = 1 << 26  # bytes of float32 logits at a time; some five tensors of that size are alive at once

Predict = Callable[[slice, Tensor], Tensor]
"""Logits (N, t, V) of some tokens, from their hidden states (N, t, C) after the last block."""


def tokens_at_once(vocabulary: int) -> int:
    """The number of tokens whose logits are computed at once."""
    return max(1, LOGITS // (4 * vocabulary))


def divergence(
    pruned: Predict, dense: Predict, y_NTC: Tensor, target_NTC: Tensor, at_once: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The mean over tokens of KL(dense ‖ pruned) (scalar, float32), in nats, and its gradient at `y_NTC`.

    A few tokens at a time go forward and backward, so that the memory does not grow with tokens times vocabulary.

    Args:
        pruned: head of the pruned model; gradients reach its learned parameters, in which they are added up.
        dense: head of the dense model.
        y_NTC: hidden states after the last block of the pruned model.
        target_NTC: the same of the dense model.
        at_once: number of tokens at a time.
        scale: a factor of all gradients; None computes none and returns zeros.
    """
    tokens = y_NTC.shape[0] * y_NTC.shape[1]
    gradient_NTC = torch.zeros_like(y_NTC)
    sums = []
    for start in range(0, y_NTC.shape[1], at_once):
        part = slice(start, start + at_once)
        with torch.no_grad():
            log_p_NTV = _log_probabilities(dense(part, target_NTC[:, part]))
        part_NTC = y_NTC[:, part].detach().requires_grad_(scale is not None)
        with torch.set_grad_enabled(scale is not None):
            logits_NTV = pruned(part, part_NTC)
        log_q_NTV = _log_probabilities(logits_NTV.detach())
        p_NTV = log_p_NTV.exp()
        sums.append((log_p_NTV.sub_(log_q_NTV).mul_(p_NTV)).masked_fill_(p_NTV == 0, 0).sum())
        if scale is not None:
            slope_NTV = log_q_NTV.exp_().sub_(p_NTV).mul_(scale / tokens)
            logits_NTV.backward(slope_NTV.to(logits_NTV.dtype))
            assert part_NTC.grad is not None
            gradient_NTC[:, part] = part_NTC.grad
    return torch.stack(sums).sum() / tokens, gradient_NTC


def _log_probabilities(logits_NTV: Tensor) -> Tensor:
    """In float32, or as wide as the logits are."""
    return logits_NTV.to(torch.promote_types(logits_NTV.dtype, torch.float32)).log_softmax(dim=-1)
