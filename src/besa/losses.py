"""How far a block's output is from what it should be."""

from __future__ import annotations

from torch import Tensor


def reconstruction_error(y_NTC: Tensor, target_NTC: Tensor) -> Tensor:
    """Mean over channels of ‖y − target‖² / ‖target‖² (scalar, float32): the first term of eq. 1, made scale-free.

    Each channel is measured against its own norm over sequences and tokens, so the few channels that carry massive
    activations do not rule the loss, and one penalty weight serves every block and model.
    """
    error_C = (y_NTC.float() - target_NTC.float()).square().sum(dim=(0, 1))
    norm_C = target_NTC.float().square().sum(dim=(0, 1))
    return (error_C / norm_C.clamp_min(1e-12)).mean()
