"""Calibration samples: windows of tokens drawn from a text.

Shape suffixes: N samples, T tokens of a sample, L tokens of a whole text.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from besa.data.documents import WHOLE, beginning, read_documents, shown
from besa.data.tokens import check_known, tokenize
from besa.errors import BesaError
from besa.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 16  # characters of a token, at most, as the mean of a text
SPARE = 4  # of a text too long to be tokenised whole, so many times the tokens needed are tokenised


@dataclass(frozen=True, eq=False)
class Calibration:
    """N samples of T token ids each, int64 on the CPU, and their origin.

    Attributes:
        tokens_NT: the token ids.
        source: the text, as the user gave it.
        seed: of the random draw.
        bos: whether every sample begins with the BOS token.
        beginning: first characters of the text's first document.
        whole: whether samples were drawn from the whole text; else from a random choice of its documents.
    """

    tokens_NT: torch.Tensor
    source: str
    seed: int
    bos: bool = False
    beginning: str = ""
    whole: bool = True

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
        return about | {"bos": self.bos, "beginning": self.beginning, "whole": self.whole, "sha256": self.sha256}


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
) -> Calibration:
    """Draw non-overlapping windows of tokens at random from a text; the same arguments give the same windows.

    A text of up to 64 Mi characters is tokenised whole. Of a longer text, documents are drawn at random in one pass and
    tokenised until they hold four times the tokens needed. Windows are drawn from these tokens.

    Args:
        source: as `read_documents` takes it.
        tokenizer: of the model to calibrate.
        samples: N, the number of windows.
        seqlen: T, tokens per window.
        seed: of the random draw of windows and their order.
        progress: is called during the download and while reading a long text.
        bos: id of the token that begins every window, as the first of its T; None for none.
        rows: rows of the model's embeddings, to check every token id of the text; None for no check.

    Raises:
        BesaError: a count is too small, the text is too short for the windows, the model does not know one of its
            tokens, or `read_documents` refuses the source.
    """
    if samples < 1:
        raise BesaError(f"Calibration with {samples} samples is impossible: ask for at least 1.")
    if seqlen < 2:
        raise BesaError(f"Calibration sequences of {seqlen} tokens are too short: ask for a --seqlen of at least 2.")
    drawn = seqlen if bos is None else seqlen - 1  # tokens of the text in each window
    documents = read_documents(source, progress)
    held, further = beginning(documents, WHOLE), next(documents, None)
    first = shown(held[0])
    if further is None:
        tokens_L = tokenize(held, "\n\n", tokenizer, total=len(held), progress=progress)
    else:
        needed = samples * drawn
        chosen = _choice(itertools.chain(held, [further], documents), max(WHOLE, LONGEST * needed), seed)
        tokens_L = tokenize(chosen, "\n\n", tokenizer, enough=SPARE * needed, progress=progress)
    if rows is not None:
        check_known(tokens_L, rows, tokenizer)
    spare = len(tokens_L) - samples * drawn
    if spare < 0:
        raise BesaError(
            f"The text {source} holds {len(tokens_L):,} tokens, but {samples:,} sequences of {drawn:,} tokens need "
            f"{samples * drawn:,}: use a longer text, fewer --samples or a shorter --seqlen."
        )
    generator = torch.Generator().manual_seed(seed)
    # With a random phase, windows begin anywhere in the text, not only at multiples of their length.
    phase = int(torch.randint(min(spare, drawn - 1) + 1, (), generator=generator))
    windows_WT = tokens_L[phase:].unfold(0, drawn, drawn)
    chosen_N = torch.randperm(len(windows_WT), generator=generator)[:samples]
    tokens_NT = windows_WT[chosen_N]
    if bos is not None:
        tokens_NT = torch.cat([torch.full((samples, 1), bos), tokens_NT], dim=1)
    return Calibration(tokens_NT, source, seed, bos is not None, first, further is None)


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
