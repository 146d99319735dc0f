"""Calibration as a caller of `besa.compress` asks for it: token batches, or text to sample them from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa.data.calibration import Calibration, sample
from besa.data.mixture import OWN, parts_of
from besa.data.seeds import LARGEST
from besa.data.tokens import check_known
from besa.methods.distilling import Distilling, Study
from besa.models.bos import bos_token
from besa.models.limits import embedding_rows, positions
from besa.progress import Progress
from besa.runtime.chat_template import dialogue_of
from besa.runtime.own_text import Author


@dataclass(frozen=True)
class Asked:
    """What was asked for; attributes as the arguments of `besa.compress`."""

    calibration: Calibration | str
    samples: int
    seqlen: int | None
    bos: str
    chat: bool
    seed: int

    def drawn(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        author: Callable[..., Author],
        progress: Progress,
    ) -> tuple[Calibration, list[str]]:
        """Token batches that the model can read, and notes on their length.

        Args:
            model: to be calibrated.
            tokenizer: of the model.
            author: makes one from the arguments of `Author` that depend on the sequences.
            progress: of downloads, and of what the model writes.

        Raises:
            BesaError: the model has no embedding for a token, or fewer positions than a sequence; or a text cannot be
                read, or is too short.
        """
        room, rows = positions(model), embedding_rows(model)
        if isinstance(self.calibration, Calibration):
            notes = room.checked(self.calibration.seqlen, "A calibration sequence of")
            check_known(self.calibration.tokens_NT, rows, tokenizer)
            return self.calibration, notes
        seqlen = room.usual if self.seqlen is None else self.seqlen
        notes, first = room.checked(seqlen, "--seqlen"), bos_token(self.bos, tokenizer, model.config)
        drawn = sample(
            self.calibration,
            tokenizer,
            self.samples,
            seqlen,
            self.seed,
            progress,
            bos=first,
            rows=rows,
            dialogue=dialogue_of(tokenizer) if self.chat else None,
            author=author(seqlen=seqlen, seed=self.seed, bos=first, progress=progress),
        )
        return drawn, notes

    def study(
        self,
        calibration: Calibration,
        distilling: Distilling,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        progress: Progress,
    ) -> Study | None:
        """What distilling learns from: further sequences of the same texts, if it asks for them and there are any.

        Token batches have no further ones, and nothing is written for it by the model.

        Args:
            calibration: as drawn.
            distilling: of the recipe.
            model: to be calibrated.
            tokenizer: of the model.
            progress: while reading a long text.

        Returns:
            None if nothing is distilled.

        Raises:
            BesaError: a text cannot be read any more.
        """
        wanted, source = distilling.studied(calibration.samples), self.calibration
        if not wanted:
            return None
        if (
            wanted <= calibration.samples
            or isinstance(source, Calibration)
            or any(part.source == OWN for part in parts_of(source))
        ):
            return Study(calibration)
        further = sample(
            source,
            tokenizer,
            wanted,
            calibration.seqlen,
            LARGEST + 1 + self.seed,  # other sequences than those of any calibration set
            progress,
            bos=bos_token(self.bos, tokenizer, model.config),
            rows=embedding_rows(model),
            dialogue=dialogue_of(tokenizer) if self.chat else None,
            at_most=True,
        )
        return Study.of(further, calibration.samples) if further.samples >= calibration.samples else Study(calibration)
