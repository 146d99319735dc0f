"""How badly a pruned model predicts, beside the dense one and beside the text, over a large vocabulary.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LOGITS = 1 << 26  # bytes of float32 logits at a time; some five tensors of that size are alive at once

Predict = Callable[[slice, Tensor], Tensor]
"""Logits (N, t, V) of some tokens, from their hidden states (N, t, C) after the last block."""


def tokens_at_once(vocabulary: int, size: int = LOGITS) -> int:
    """The number of tokens whose logits are computed at once.

    Args:
        vocabulary: logits of a token.
        size: bytes of float32 logits, at most.
    """
    return max(1, size // (4 * vocabulary))


def prediction_loss(
    pruned: Predict,
    dense: Predict,
    y_NTC: Tensor,
    target_NTC: Tensor,
    tokens_NT: Tensor,
    cross_entropy: float,
    at_once: int,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean over tokens of KL(dense ‖ pruned) + `cross_entropy` · −log pruned(next token); its gradient at `y_NTC`.

    The loss is a float32 scalar in nats. The last token of a sequence, which none follows, has its divergence alone. A
    few tokens at a time go forward and backward, so that the memory does not grow with tokens times vocabulary.

    Args:
        pruned: head of the pruned model; gradients reach its learned parameters, in which they are added up.
        dense: head of the dense model.
        y_NTC: hidden states after the last block of the pruned model.
        target_NTC: the same of the dense model.
        tokens_NT: the text, on the device of `y_NTC`.
        cross_entropy: factor of what the text says beside what the dense model says.
        at_once: number of tokens at a time.
        scale: a factor of all gradients; None computes none and returns zeros.
    """
    gradient_NTC = torch.zeros_like(y_NTC)
    sums = []
    for start in range(0, y_NTC.shape[1], at_once):
        part = slice(start, start + at_once)
        next_NT1 = tokens_NT[:, start + 1 : start + at_once + 1, None]
        followed = slice(next_NT1.shape[1])
        with torch.no_grad():
            log_p_NTV = _log_probabilities(dense(part, target_NTC[:, part]))
        part_NTC = y_NTC[:, part].detach().requires_grad_(scale is not None)
        with torch.set_grad_enabled(scale is not None):
            logits_NTV = pruned(part, part_NTC)
        log_q_NTV = _log_probabilities(logits_NTV.detach())
        p_NTV = log_p_NTV.exp()
        if cross_entropy:
            sums.append(-cross_entropy * log_q_NTV[:, followed].gather(-1, next_NT1).sum())
        sums.append((log_p_NTV.sub_(log_q_NTV).mul_(p_NTV)).masked_fill_(p_NTV == 0, 0).sum())
        if scale is not None:
            slope_NTV = log_q_NTV.exp_()
            slope_NTV[:, followed] *= 1 + cross_entropy
            p_NTV[:, followed].scatter_add_(-1, next_NT1, torch.full_like(next_NT1, cross_entropy, dtype=p_NTV.dtype))
            slope_NTV.sub_(p_NTV).mul_(scale / tokens_NT.numel())
            logits_NTV.backward(slope_NTV.to(logits_NTV.dtype))
            assert part_NTC.grad is not None
            gradient_NTC[:, part] = part_NTC.grad
    return torch.stack(sums).sum() / tokens_NT.numel(), gradient_NTC


def _log_probabilities(logits_NTV: Tensor) -> Tensor:
    """In float32, or as wide as the logits are."""
    return logits_NTV.to(torch.promote_types(logits_NTV.dtype, torch.float32)).log_softmax(dim=-1)
