"""A model that is measured, and how sparse it is."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa.errors import BesaError
from besa.models.finding import find_blocks
from besa.record import RunRecord
from besa.storage.entry import besa_entry

ROUNDED = 0.2  # more zeros than this share are not of rounding alone: to 4 bits makes some 12 %


@dataclass(frozen=True)
class Opened:
    """A model to measure.

    Attributes:
        model: in memory.
        tokenizer: of the model.
        name: of the model.
        revision: commit of the Hub; None for a local model.
        fingerprint: digest of the files; None for a model in memory.
        record: of the run that pruned it; None if there is none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    fingerprint: str | None = None
    record: RunRecord | None = None

    @property
    def sparsity(self) -> float | None:
        """The share of zeros in the matrices of the blocks; None for a dense model.

        It is counted in the weights. Where all zeros of the run are still there, it is the figure of config.json,
        which leaves out matrices that the run skipped. That figure also stands for packed weights, which are not
        counted, and for a model whose zeros were cut out (`besa shrink`).

        Raises:
            BesaError: config.json gives something that is no number.
        """
        entry = besa_entry(vars(self.model.config))
        told = entry.get("sparsity")
        if not isinstance(told, int | float | None):
            raise BesaError(f'The config.json of {self.name} is damaged: under "besa", sparsity is {told!r}.')
        counted = _counted(self.model)
        if told is not None and ("shrunk" in entry or counted is None):
            return told
        if counted is None:
            return None
        zeros, weights = counted
        if told is not None and self.record is not None and zeros >= self.record.zeros:
            return told
        return zeros / weights if told is not None or zeros > ROUNDED * weights else None


def _counted(model: PreTrainedModel) -> tuple[int, int] | None:
    """How many weights in the matrices of the blocks are zero, and how many there are; None if that cannot be seen.

    A module that has the sizes of a linear and is no `nn.Linear` is a packed one, whose weights are not counted.
    """
    with suppress(BesaError):
        blocks = find_blocks(model)
        parts = [part for block in blocks for part in block.module.modules()]
        packed = any(hasattr(part, "in_features") and not isinstance(part, nn.Linear) for part in parts)
        weights = [block.weight(name) for block in blocks for name in block.prunables]
        if not packed and not any(w_OI.is_meta for w_OI in weights):
            numel = sum(w_OI.numel() for w_OI in weights)
            return numel - sum(int(w_OI.count_nonzero()) for w_OI in weights), numel
    return None
