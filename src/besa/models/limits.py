"""Limits of a model: how many tokens a sequence may have, and how many token ids exist."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from besa.errors import BesaError, Notice
from besa.models.loading import read_config, skeleton
from besa.models.source import Source

USUAL = 2048  # default tokens of a sequence or window, as in the papers
OFFSETS = range(3)  # rows that a table of positions may have beyond one for each position; OPT has two


@dataclass(frozen=True)
class Positions:
    """How many positions a model has.

    Attributes:
        most: tokens of the longest sequence that the model is made for, None if its configuration does not say.
        fixed: whether longer sequences are impossible, as with learned positions. Rotary positions can be computed.
    """

    most: int | None
    fixed: bool

    @property
    def usual(self) -> int:
        """Default tokens of a sequence."""
        return min(USUAL, self.most or USUAL)

    def checked(self, length: int, option: str) -> list[str]:
        """Check a length against the positions.

        Args:
            length: tokens of a sequence.
            option: that set the length, for the messages.

        Returns:
            A note for the user, which is also given as a `Notice`; or no note.

        Raises:
            BesaError: the model cannot take so many tokens.
        """
        if self.most is None or length <= self.most:
            return []
        if self.fixed:
            raise BesaError(f"{option} {length}: the model has {self.most:,} positions, so give at most {self.most}.")
        note = f"{option} {length} is beyond the {self.most:,} positions that the model was trained for."
        warnings.warn(note, Notice, stacklevel=2)
        return [note]


def positions(model: PreTrainedModel) -> Positions:
    """How many positions a model has, from its modules and configuration. A skeleton is enough."""
    config = model.config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated < 1:
        # MPT makes the biases of its attention for exactly so many tokens.
        most = getattr(config, "max_seq_len", None)
        return Positions(most, True) if isinstance(most, int) else Positions(None, False)
    tables = list(_tables(model, stated))
    return Positions(min([stated, *tables]), bool(tables))


def _tables(model: PreTrainedModel, stated: int) -> Iterator[int]:
    """The number of positions in each table of them: learned embeddings, and sinusoids in a buffer."""
    tokens = set(model.get_input_embeddings().modules())
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module not in tokens and module.num_embeddings - stated in OFFSETS:
            # Positions begin after the row of the padding token (RoBERTa).
            yield module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.dim() == 2 and buffer.shape[0] == stated:
            yield stated


def usual_length(source: Source) -> int:
    """Default tokens of a sequence or window for a model: 2048, or as many as the model has positions.

    Raises:
        BesaError: its configuration cannot be read.
    """
    return positions(skeleton(source, read_config(source))).usual


def embedding_rows(model: PreTrainedModel) -> int:
    """The number of token ids that the model has an embedding for.

    Raises:
        BesaError: its embeddings are no matrix.
    """
    embeddings = model.get_input_embeddings()
    if (rows := getattr(embeddings, "token_ids", None)) is not None:  # of codes, from which a weight is made anew
        return int(rows)
    if not hasattr(embeddings, "weight"):
        raise BesaError(
            f"{type(model).__name__} has no single matrix of embeddings for token ids: use a causal decoder that has."
        )
    return int(embeddings.weight.shape[0])
