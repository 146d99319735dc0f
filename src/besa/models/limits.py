"""What the tables of a model limit: how many tokens a sequence may have, and how many tokens are known."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from besa.errors import BesaError, Notice
from besa.models.loading import Source, read_config, skeleton

USUAL = 2048  # tokens of a sequence or window unless asked otherwise: what the papers use
OFFSETS = range(3)  # rows that a table of positions may have besides one for each; OPT has two


@dataclass(frozen=True)
class Positions:
    """How many positions a model has.

    Attributes:
        most: tokens of the longest sequence it is made for, None where its configuration says nothing.
        fixed: whether there is nothing for more, as with learned positions; else they can be computed (rotary).
    """

    most: int | None
    fixed: bool

    @property
    def usual(self) -> int:
        """Tokens of a sequence unless asked otherwise."""
        return min(USUAL, self.most or USUAL)

    def checked(self, length: int, option: str) -> list[str]:
        """Hold a length that was asked for against the positions.

        Args:
            length: tokens of a sequence.
            option: what it was given by.

        Returns:
            A sentence on what a user should know, which is also a `Notice`; or nothing.

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
    """How many positions a model has, from its modules and configuration; a skeleton will do."""
    config = model.config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated < 1:
        # MPT makes the biases of its attention for exactly so many tokens.
        most = getattr(config, "max_seq_len", None)
        return Positions(most, True) if isinstance(most, int) else Positions(None, False)
    tables = list(_tables(model, stated))
    return Positions(min([stated, *tables]), bool(tables))


def _tables(model: PreTrainedModel, stated: int) -> Iterator[int]:
    """How many positions each table has that is read at the place of a token: embeddings, and sinusoids of old kind."""
    tokens = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not tokens and module.num_embeddings - stated in OFFSETS:
            # Positions begin behind the one that padding has (RoBERTa).
            yield module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.dim() == 2 and buffer.shape[0] == stated:
            yield stated


def usual_length(source: Source) -> int:
    """Tokens of a sequence or window for a model unless asked otherwise: 2048, or as many as it has positions.

    Raises:
        BesaError: its configuration cannot be read.
    """
    return positions(skeleton(source, read_config(source))).usual


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids the model knows."""
    rows: int = model.get_input_embeddings().weight.shape[0]
    return rows
