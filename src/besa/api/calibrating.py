"""Calibration as a caller of `besa.compress` asks for it: token batches, or text to sample them from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa.data.calibration import Calibration, sample
from besa.data.mixture import OWN, parts_of
from besa.data.seeds import LARGEST
from besa.data.tokens import check_known
from besa.methods.distilling import Distilling, TrainingSet
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

    def length(self, model: PreTrainedModel) -> int:
        """Tokens of a sequence."""
        if isinstance(self.calibration, Calibration):
            return self.calibration.seqlen
        return positions(model).usual if self.seqlen is None else self.seqlen

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
        seqlen = self.length(model)
        notes, first = room.checked(seqlen, "--seqlen"), bos_token(self.bos, tokenizer, model.config)
        written = author(seqlen=seqlen, seed=self.seed, bos=first, progress=progress)
        return self._sampled(model, tokenizer, progress, self.samples, seqlen, self.seed, author=written), notes

    def training_set(
        self,
        calibration: Calibration,
        distilling: Distilling,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        progress: Progress,
    ) -> tuple[TrainingSet | None, list[str]]:
        """What distilling learns from: further sequences of the same texts, if it asks for them and there are any.

        They are drawn anew, so a few may overlap with the calibration set. Token batches have no further ones, and the
        model writes none: then every epoch has the calibration set.

        Args:
            calibration: as drawn.
            distilling: of the recipe.
            model: to be calibrated.
            tokenizer: of the model.
            progress: while reading a long text.

        Returns:
            The sequences, None if nothing is distilled; and a note if they are fewer than asked for.

        Raises:
            BesaError: a text cannot be read any more.
        """
        wanted = distilling.training_sequences(calibration.samples)
        if not wanted:
            return None, []
        made = TrainingSet(calibration)
        if wanted > calibration.samples and self._has_further:
            seed = LARGEST + 1 + self.seed  # as of no calibration set
            drawn = self._sampled(model, tokenizer, progress, wanted, calibration.seqlen, seed, at_most=True)
            if drawn.samples >= calibration.samples:
                made = TrainingSet.of(drawn, calibration.samples)
        there = made.calibration.samples
        again = f"Distilling asks for {wanted:,} sequences, but has {there:,}: later epochs learn from the same again."
        return made, [again] if there < wanted else []

    @property
    def _has_further(self) -> bool:
        """Whether more can be drawn: there is a text, and the model does not write it."""
        source = self.calibration
        return isinstance(source, str) and all(part.source != OWN for part in parts_of(source))

    def _sampled(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        progress: Progress,
        samples: int,
        seqlen: int,
        seed: int,
        *,
        author: Author | None = None,
        at_most: bool = False,
    ) -> Calibration:
        """Sequences of the texts that were asked for; further arguments and errors as of `sample`."""
        assert isinstance(self.calibration, str)
        return sample(
            self.calibration,
            tokenizer,
            samples,
            seqlen,
            seed,
            progress,
            bos=bos_token(self.bos, tokenizer, model.config),
            rows=embedding_rows(model),
            dialogue=dialogue_of(tokenizer) if self.chat else None,
            author=author,
            at_most=at_most,
        )
