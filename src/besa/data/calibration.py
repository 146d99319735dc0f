"""Calibration samples: sequences of tokens drawn from texts, each by its share, or written by the model itself.

Shape suffixes: N samples, T tokens of a sample, L tokens of a whole text, W windows of a whole text.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from besa.data.dialogues import dialogues
from besa.data.documents import WHOLE, beginning, read_documents, shown
from besa.data.embedded import EMBEDDED
from besa.data.mixture import MIX, OWN, counts, interleaved, levelled, parts_of
from besa.data.tokens import check_known, packed, tokenize
from besa.errors import BesaError
from besa.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 16  # characters of a token, at most, as the mean of a text
SPARE = 4  # of a text too long to be tokenised whole, so many times the tokens needed are tokenised
RENDERED = 64  # dialogues tokenised at a time
PASSAGE = 2  # characters of a passage that becomes a dialogue, for each token of a sequence: of prose, half a sequence
SHORTEST = 256  # characters of such a passage, however short the sequences are
BESIDES = "use a longer text, fewer --samples or a shorter --seqlen."

Dialogue = Callable[[str, str], str]  # renders what a user says and the answer
Author = Callable[[int], torch.Tensor]  # writes so many sequences (N, T)


@dataclass(frozen=True)
class Contribution:
    """What a text of a mixture gave.

    Attributes:
        source: the text.
        share: of the sequences, as asked for.
        samples: sequences that it gave.
        beginning: first characters of its first document; of one that gave none, nothing.
        whole: as of `Calibration`.
    """

    source: str
    share: float
    samples: int
    beginning: str
    whole: bool


@dataclass(frozen=True, eq=False)
class Calibration:
    """N samples of T token ids each, int64 on the CPU, and their origin.

    Attributes:
        tokens_NT: the token ids.
        source: the text or texts, as the user gave them.
        seed: of the random draw.
        bos: whether every sample begins with the BOS token.
        beginning: first characters of the text's first document.
        whole: whether samples were drawn from the whole text; else from a random choice of its documents.
        chat: whether documents were rendered as dialogues in the model's chat template.
        parts: what each text of a mixture gave; none for a single text.
    """

    tokens_NT: torch.Tensor
    source: str
    seed: int
    bos: bool = False
    beginning: str = ""
    whole: bool = True
    chat: bool = False
    parts: tuple[Contribution, ...] = ()

    def __post_init__(self) -> None:
        """Check that the tokens are sequences of token ids.

        Raises:
            BesaError: `tokens_NT` is no tensor of int64 on the CPU, or has not two dimensions of at least 1.
        """
        tokens = self.tokens_NT
        ids = isinstance(tokens, torch.Tensor) and tokens.dtype == torch.int64 and tokens.device.type == "cpu"
        if not ids or tokens.dim() != 2 or tokens.numel() == 0:
            shown = (
                f"a tensor of {tokens.dtype} and shape {tuple(tokens.shape)} on {tokens.device}"
                if isinstance(tokens, torch.Tensor)
                else type(tokens).__name__
            )
            raise BesaError(f"Calibration takes sequences of token ids: give a torch.int64 tensor (N, T), not {shown}.")

    @property
    def samples(self) -> int:
        """N, the number of sequences."""
        return self.tokens_NT.shape[0]

    @property
    def seqlen(self) -> int:
        """T, the tokens of each sequence."""
        return self.tokens_NT.shape[1]

    @property
    def sha256(self) -> str:
        """The identity of the data in run records: hex digest of the token ids as little-endian int64."""
        return hashlib.sha256(self.tokens_NT.numpy().astype("<i8").tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The identity of the data, for run records."""
        about = {"source": self.source, "samples": self.samples, "seqlen": self.seqlen, "seed": self.seed}
        about |= {"bos": self.bos, "beginning": self.beginning, "whole": self.whole, "sha256": self.sha256}
        about |= {"chat": True} if self.chat else {}
        return about | ({"parts": [asdict(part) for part in self.parts]} if self.parts else {})


def sample(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seqlen: int,
    seed: int,
    progress: Progress = silent,
    *,
    bos: int | None = None,
    rows: int | None = None,
    dialogue: Dialogue | None = None,
    author: Author | None = None,
    at_most: bool = False,
) -> Calibration:
    """Draw sequences of tokens at random from a text or a mixture; the same arguments give the same sequences.

    Sequences of a text are windows that do not overlap. A text of up to 64 Mi characters is tokenised whole. Of a
    longer text, documents are drawn at random in one pass and tokenised until they hold four times the tokens needed.
    Windows are drawn from these tokens. A dialogue is never cut at its beginning: each sequence begins with one.

    A mixture has its shares of the sequences exactly, by largest remainder. In its order every so many-th sequence
    is of another text. Of `MIX`, texts that are too short for an equal share give all they have.

    Args:
        source: as `parts_of` takes it.
        tokenizer: of the model to calibrate.
        samples: N, the number of sequences.
        seqlen: T, tokens per sequence.
        seed: of the random draw of windows and their order.
        progress: is called during the download and while reading a long text.
        bos: id of the token that begins every sequence, as the first of its T; None for none.
        rows: rows of the model's embeddings, to check every token id of the text; None for no check.
        dialogue: renders passages as dialogues; None for plain text.
        author: writes the sequences of `OWN`.
        at_most: a text that is too short gives all it has.

    Raises:
        BesaError: a count is too small, a text is too short for its sequences, the model does not know one of its
            tokens, there is no author for `OWN`, or `parts_of` or `read_documents` refuse the source.
    """
    if samples < 1:
        raise BesaError(f"Calibration with {samples} samples is impossible: ask for at least 1.")
    if seqlen < 2:
        raise BesaError(f"Calibration sequences of {seqlen} tokens are too short: ask for a --seqlen of at least 2.")
    parts = parts_of(source)
    supply = _Supply(tokenizer, seqlen, seed, progress, bos, rows, dialogue, at_most)
    drawn: list[tuple[Contribution, torch.Tensor]] = []
    for part, size in zip(parts, counts([part.share for part in parts], samples), strict=True):
        if part.source == OWN:
            drawn.append(supply.own(float(part.share), size, author))
        elif part.source == MIX:
            drawn += supply.mix(float(part.share), size)
        else:
            drawn.append(supply.text(part.source, float(part.share), size))
    given = tuple(contribution for contribution, _ in drawn)
    tokens_NT = torch.cat([tokens for _, tokens in drawn])
    if len(given) > 1:
        tokens_NT = tokens_NT[interleaved([contribution.samples for contribution in given], seed)]
    first = next(contribution.beginning for contribution in given if contribution.samples)
    return Calibration(
        tokens_NT,
        source,
        seed,
        bos is not None,
        first,
        all(contribution.whole for contribution in given),
        dialogue is not None,
        given if len(given) > 1 else (),
    )


@dataclass(frozen=True)
class _Held:
    """What was read of a text, as sequences to choose from.

    Attributes:
        source: the text.
        beginning: as of `Contribution`.
        whole: as of `Calibration`.
        room: number of sequences that it has.
        tokens: how many tokens it holds.
        take: the first or a random choice of so many sequences (N, T).
    """

    source: str
    beginning: str
    whole: bool
    room: int
    tokens: int
    take: Callable[[int], torch.Tensor]

    def giving(self, share: float, size: int) -> tuple[Contribution, torch.Tensor]:
        """So many sequences, and the account of them."""
        return Contribution(self.source, share, size, self.beginning, self.whole), self.take(size)


@dataclass(frozen=True)
class _Supply:
    """Draws from one text after another; attributes as the arguments of `sample`."""

    tokenizer: PreTrainedTokenizerBase
    seqlen: int
    seed: int
    progress: Progress
    bos: int | None
    rows: int | None
    dialogue: Dialogue | None
    at_most: bool

    @property
    def drawn(self) -> int:
        """Tokens of the text in each sequence."""
        return self.seqlen if self.bos is None else self.seqlen - 1

    def text(self, source: str, share: float, size: int) -> tuple[Contribution, torch.Tensor]:
        """Sequences of one text.

        Raises:
            BesaError: it is too short, or as `sample`.
        """
        if not size:
            return self._nothing(source, share)
        held = self._read(source, size)
        if held.room < size and not self.at_most:
            one = size == 1
            wanted = f"{size:,} sequence{'' if one else 's'} of {self.drawn:,} tokens"
            if self.dialogue is not None:
                raise BesaError(
                    f"The text {source} holds dialogues for {held.room:,} sequences only, but {wanted} "
                    f"{'is' if one else 'are'} needed: {BESIDES}"
                )
            raise BesaError(
                f"The text {source} holds {held.tokens:,} tokens, but {wanted} need{'s' if one else ''} "
                f"{size * self.drawn:,}: {BESIDES}"
            )
        return held.giving(share, min(size, held.room))

    def mix(self, share: float, size: int) -> list[tuple[Contribution, torch.Tensor]]:
        """Sequences of all embedded texts, as equal in number as these allow.

        Raises:
            BesaError: together they are too short, or as `sample`.
        """
        every, equal = list(EMBEDDED), share / len(EMBEDDED)
        if size < len(every):
            return [self.text(source, equal, int(place < size)) for place, source in enumerate(every)]
        held = [self._read(source, size) for source in every]
        if (room := sum(each.room for each in held)) < size and not self.at_most:
            raise BesaError(
                f"The embedded texts hold {room:,} sequences of {self.drawn:,} tokens, but {size:,} are needed: "
                "use fewer --samples, a shorter --seqlen, or texts of your own."
            )
        sizes = levelled([each.room for each in held], min(size, room))
        return [each.giving(equal, own) for each, own in zip(held, sizes, strict=True)]

    def own(self, share: float, size: int, author: Author | None) -> tuple[Contribution, torch.Tensor]:
        """Sequences that the model writes.

        Raises:
            BesaError: there is nobody to write them.
        """
        if not size:
            return self._nothing(OWN, share)
        if author is None:
            raise BesaError(f"--calibration {OWN} needs a model that writes: sample from a text here.")
        tokens_NT = author(size)
        return Contribution(OWN, share, size, shown(self.tokenizer.decode(tokens_NT[0])), True), tokens_NT

    def _nothing(self, source: str, share: float) -> tuple[Contribution, torch.Tensor]:
        return Contribution(source, share, 0, "", True), torch.zeros(0, self.seqlen, dtype=torch.int64)

    def _read(self, source: str, size: int) -> _Held:
        """A text as at least so many sequences, if it has them."""
        documents = read_documents(source, self.progress)
        held, further = beginning(documents, WHOLE), next(documents, None)
        first, whole = shown(held[0]), further is None
        needed = size * self.drawn
        if further is not None:
            held = _choice(itertools.chain(held, [further], documents), max(WHOLE, LONGEST * needed), self.seed)
        if self.dialogue is not None:
            sequences = list(
                itertools.islice(packed(self._dialogues(held, self.dialogue), self.seqlen, self.bos), size)
            )
            tokens = torch.tensor(sequences, dtype=torch.int64).view(-1, self.seqlen)
            return _Held(source, first, whole, len(tokens), tokens.numel(), lambda count: tokens[:count])
        if whole:
            tokens_L = tokenize(held, "\n\n", self.tokenizer, total=len(held), progress=self.progress)
        else:
            tokens_L = tokenize(held, "\n\n", self.tokenizer, enough=SPARE * needed, progress=self.progress)
        self._check(tokens_L)
        room = len(tokens_L) // self.drawn
        return _Held(source, first, whole, room, len(tokens_L), lambda count: self._windows(tokens_L, count))

    def _windows(self, tokens_L: torch.Tensor, size: int) -> torch.Tensor:
        """A random choice of windows that do not overlap (size, T)."""
        if not size:  # of a text that is shorter than a window
            return torch.zeros(0, self.seqlen, dtype=torch.int64)
        generator = torch.Generator().manual_seed(self.seed)
        # With a random phase, windows begin anywhere in the text, not only at multiples of their length.
        spare = len(tokens_L) - size * self.drawn
        phase = int(torch.randint(min(spare, self.drawn - 1) + 1, (), generator=generator))
        windows_WT = tokens_L[phase:].unfold(0, self.drawn, self.drawn)
        chosen_N = torch.randperm(len(windows_WT), generator=generator)[:size]
        tokens_NT = windows_WT[chosen_N]
        if self.bos is not None:
            tokens_NT = torch.cat([torch.full((size, 1), self.bos), tokens_NT], dim=1)
        return tokens_NT

    def _dialogues(self, documents: list[str], dialogue: Dialogue) -> Iterator[list[int]]:
        """The token ids of one rendered dialogue after another, in random order."""
        turns = list(dialogues(documents, max(SHORTEST, PASSAGE * self.seqlen)))
        random.Random(self.seed).shuffle(turns)
        for start in range(0, len(turns), RENDERED):
            texts = [dialogue(*each) for each in turns[start : start + RENDERED]]
            batch_ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            self._check(torch.tensor([token for ids in batch_ids for token in ids], dtype=torch.int64))
            yield from batch_ids

    def _check(self, tokens: torch.Tensor) -> None:
        if self.rows is not None:
            check_known(tokens, self.rows, self.tokenizer)


def _choice(documents: Iterable[str], characters: int, seed: int) -> list[str]:
    """Random documents, in random order, that hold so many characters; one pass over all documents keeps only these."""
    draw = random.Random(seed).random
    kept: list[tuple[float, int, str]] = []  # a heap; the top is dropped next
    held = 0
    for place, document in enumerate(documents):
        key = -draw()
        if held >= characters and key < kept[0][0]:
            continue
        heapq.heappush(kept, (key, place, document))
        held += len(document)
        while held - len(kept[0][2]) >= characters:
            held -= len(heapq.heappop(kept)[2])
    return [document for _, _, document in sorted(kept, reverse=True)]
