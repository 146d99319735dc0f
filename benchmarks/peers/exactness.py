"""How exactly a pruned model has the zeros that were asked for.

Shape suffixes: O rows (output channels), G groups of a row, M columns of a group.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from besa.models.finding import find_blocks


def exactness(model: PreTrainedModel, share: float, group: int | None) -> dict[str, Any]:
    """Zeros in the linears of all blocks.

    Args:
        model: that was pruned.
        share: of zeros that was asked for.
        group: consecutive columns of a row that share was asked for in; None for a whole linear.

    Returns:
        ``weights`` and ``zeros`` of all linears, the ``excess`` of zeros over the share of each linear, rounded, summed
        up, the ``lowest`` and ``highest`` share of a linear, ``linears`` and how many of them are ``uneven``: have
        other than their share. For a pattern, also how many ``broken_groups`` have other than their share.
    """
    linears = [block.weight(name) for block in find_blocks(model) for name in block.prunables]
    zeros = [int((w_OI == 0).sum()) for w_OI in linears]
    excess = [count - round(share * w_OI.numel()) for count, w_OI in zip(zeros, linears, strict=True)]
    shares = [count / w_OI.numel() for count, w_OI in zip(zeros, linears, strict=True)]
    found = {
        "weights": sum(w_OI.numel() for w_OI in linears),
        "zeros": sum(zeros),
        "excess": sum(excess),
        "lowest": min(shares),
        "highest": max(shares),
        "linears": len(linears),
        "uneven": sum(count != 0 for count in excess),
    }
    if group is not None:
        zeros_OG = [(w_OI == 0).unflatten(1, (-1, group)).sum(dim=-1) for w_OI in linears]
        found["broken_groups"] = sum(int((count_OG != share * group).sum()) for count_OG in zeros_OG)
    return found
