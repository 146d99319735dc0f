"""Text that the dense model writes itself, to calibrate on: sampled in batches, and kept in the user's cache folder.

A plain sequence goes on from the BOS token, if the tokenizer puts one before a text, at a temperature that falls to 1
over the first tokens. Else it goes on from a few tokens of the embedded texts. In a chat, the model answers short
passages of these texts until it ends, and dialogues are joined to sequences. The fifth with the highest perplexity by
the model's own probabilities is dropped.

Random numbers come from a generator on the CPU. So the text depends on model, seed and sizes alone, as far as the
probabilities do: they are rounded by the device, the number of threads, torch and transformers. The cache therefore
decides for all that follows.

Shape suffixes: N sequences, T tokens of a sequence, V tokens of the vocabulary, S tokens that a sequence begins with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from besa.counting.precision import widest
from besa.data.assets import cache_dir
from besa.data.calibration import sample
from besa.data.dialogues import questions
from besa.data.mixture import MIX, OWN
from besa.data.tokens import packed
from besa.errors import BesaError
from besa.models.borrowing import borrowed
from besa.models.bos import adds_bos
from besa.models.limits import embedding_rows
from besa.models.loading import load_model
from besa.models.sizes import channels
from besa.models.source import Source
from besa.models.streaming import Decoder
from besa.progress import Progress
from besa.runtime.chat_template import DATE, message, prompt_of
from besa.storage.tensors import save_tensors
from besa.storage.writing import explained
from besa.system import devices, ranks

VERSION = 1  # of all that decides the text besides model, seed and sizes
DROPPED = 5  # of so many pieces, one is dropped
PASSES = DROPPED / (DROPPED - 1)  # over a calibration set that it makes up, in arithmetic
PREFIX = 8  # tokens of a real text that a sequence goes on from
HOTTEST, HOT = 2.0, 10  # temperature of the first token after BOS, and tokens until it is 1
SHORTEST = 2 * PREFIX  # tokens of a sequence, at least
LARGEST = 32  # sequences of a batch, at most
CACHE, ACCELERATOR_CACHE = 2 << 30, 8 << 30  # bytes of keys and values of a batch; fixed, as the batch decides bits
FOLDER, NAME = "own-text", "tokens"

Piece = tuple[list[int], float]  # token ids, and the mean logarithm of the probabilities of those that were written


@dataclass(frozen=True)
class Author:
    """A dense model that writes calibration sequences.

    Attributes:
        decoder: of the model that will be pruned.
        opened: where the model is loaded from to write, if the decoder reads it block by block.
        tokenizer: of the model.
        identity: of the model, as in run records; without a fingerprint, nothing is kept in the cache.
        seqlen: T.
        seed: of all that is random.
        bos: token that begins every sequence; None for none.
        chat: whether the model answers in its chat template.
        device: where to compute.
        dtype: as of `load_model`.
        progress: called with (tokens written, number of tokens, note).
    """

    decoder: Decoder
    opened: Source | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: dict[str, Any]
    seqlen: int
    seed: int
    bos: int | None
    chat: bool
    device: torch.device
    dtype: str
    progress: Progress

    def __call__(self, samples: int) -> Tensor:
        """Write sequences (N, T), int64. Rank 0 writes them, or reads those that were written before.

        Raises:
            BesaError: the model cannot generate, it has no room in memory, sequences are too short, its outputs are not
                finite, or the cache folder cannot be written.
        """
        model = self.decoder.model
        if not isinstance(model, GenerationMixin):
            raise BesaError(f"{type(model).__name__} cannot generate text, so calibrate it on other text than {OWN}.")
        if self.seqlen < SHORTEST:
            raise BesaError(
                f"Sequences of {self.seqlen} tokens are too short for text of the model's own: ask for a --seqlen of "
                f"at least {SHORTEST}."
            )
        tokens_NT = self._read_or_written(samples) if ranks.is_first() else torch.zeros(0, dtype=torch.int64)
        return ranks.tensors_from_first({NAME: tokens_NT})[NAME]

    def _read_or_written(self, samples: int) -> Tensor:
        needed = -(-samples * DROPPED // (DROPPED - 1))
        starts = self._starts(needed)
        first_NS = next(starts, None)
        if first_NS is None:
            raise self._too_little()
        path = self._path(samples, first_NS)
        if path is None:
            return self._written(samples, chain([first_NS], starts))
        kept_NT = _kept(path, (samples, self.seqlen))
        if kept_NT is None:
            with explained(path):  # before the work
                path.parent.mkdir(parents=True, exist_ok=True)
                with TemporaryFile(dir=path.parent):
                    pass
            kept_NT = self._written(samples, chain([first_NS], starts))
            save_tensors(path, {NAME: kept_NT}, {"sha256": _sha256(kept_NT)})
        return kept_NT

    def _path(self, samples: int, first_NS: Tensor) -> Path | None:
        """Where the text is kept; None for a model that the caller loaded, which has no identity."""
        if self.identity.get("fingerprint") is None:
            return None
        decisive = {key: self.identity[key] for key in ("fingerprint", "dtype")}
        decisive |= {"version": VERSION, "samples": samples, "seqlen": self.seqlen, "seed": self.seed}
        # What the first batch begins with is decided by tokenizer, template and texts.
        decisive |= {"bos": self.bos, "chat": self.chat, "starts": _sha256(first_NS)}
        key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]
        return cache_dir() / FOLDER / f"{key}.safetensors"

    @property
    def _begins(self) -> int | None:
        """The token that a plain text begins with for this model; None to begin with real text."""
        bos: int | None = self.tokenizer.bos_token_id if adds_bos(self.tokenizer) else None
        return self.bos if self.bos is not None else bos

    def _starts(self, needed: int) -> Iterator[Tensor]:
        """Batches of beginnings of equal length (N, S): for so many sequences, or as many chats as there are."""
        batch = min(needed, batch_of(self.decoder.model, self.seqlen, self.device))
        if self.chat:
            yield from self._prompts(batch)
        elif (begins := self._begins) is not None:
            yield from torch.full((needed, 1), begins).split(batch)
        else:
            rows = embedding_rows(self.decoder.model)
            real = sample(MIX, self.tokenizer, needed, PREFIX, self.seed, self.progress, rows=rows)
            yield from real.tokens_NT.split(batch)

    def _prompts(self, batch: int) -> Iterator[Tensor]:
        """Batches of questions in the template; those of a batch have equal length, so that nothing needs padding."""
        by_length: dict[int, list[Tensor]] = {}
        for question in questions(self.seed, self.progress):
            prompt_1S = prompt_of(self.tokenizer, [message("user", question)], DATE)
            length = prompt_1S.shape[1]
            if length > self.seqlen // 2:
                continue
            group = by_length.setdefault(length, [])
            group.append(prompt_1S)
            if len(group) == batch:
                yield torch.cat(by_length.pop(length))
        yield from map(torch.cat, by_length.values())

    def _written(self, samples: int, starts: Iterator[Tensor]) -> Tensor:
        """Sequences (N, T), written now.

        Raises:
            BesaError: as of `__call__`.
        """
        self._check_room()
        goal = samples * self.seqlen * PASSES
        pieces: list[Piece] = []
        with self._whole() as model, _plain_settings(model) as ends:
            generator = torch.Generator().manual_seed(self.seed)
            for starts_NS in starts:
                done = sum(len(ids) for ids, _ in pieces)
                told = _told(self.progress, done, goal, len(starts_NS))
                pieces += self._continued(model, starts_NS, ends, generator, told)
                sequences = list(islice(packed(_likeliest(pieces), self.seqlen, self.bos), samples))
                if len(sequences) == samples:
                    return torch.tensor(sequences, dtype=torch.int64)
        raise self._too_little()

    def _continued(
        self,
        model: PreTrainedModel,
        starts_NS: Tensor,
        ends: Sequence[int],
        generator: torch.Generator,
        told: Callable[[int], None],
    ) -> list[Piece]:
        """The model's continuations of a batch of beginnings; `ends` are tokens that end an answer."""
        starts_NS = starts_NS.to(model.device)
        hot = not self.chat and self._begins is not None
        unwanted = int(hot and self.bos is None)  # the model needs its BOS token, the sequence has none
        more = self.seqlen + unwanted - starts_NS.shape[1]
        ends = [*{*ends, self.tokenizer.eos_token_id} - {None}] if self.chat else []
        sampling = _Sampling(starts_NS, HOT if hot else 0, ends, generator, told)
        stopping = {"eos_token_id": ends, "pad_token_id": ends[0]} if ends else {}
        made_NT = model.generate(
            starts_NS,
            attention_mask=torch.ones_like(starts_NS),
            max_new_tokens=more,
            do_sample=False,  # the likeliest of what `_Sampling` leaves
            logits_processor=[sampling],
            **stopping,
        ).tolist()
        lengths, means = sampling.lengths_N.tolist(), (sampling.likelihood_N / sampling.lengths_N).tolist()
        if not all(mean > -torch.inf for mean in means):  # NaN is not larger either
            raise BesaError(f"The outputs of {type(model).__name__} are not finite: try --dtype float32.")
        start = starts_NS.shape[1]
        return [
            (ids[unwanted : start + length], mean) for ids, length, mean in zip(made_NT, lengths, means, strict=True)
        ]

    @contextmanager
    def _whole(self) -> Iterator[PreTrainedModel]:
        """The whole model on its device; one that was read from disk is freed with its last user."""
        if self.decoder.folder is None:
            with borrowed(self.decoder.model, self.device):
                yield self.decoder.model
        else:
            assert isinstance(self.opened, Source)
            yield load_model(self.opened, self.dtype).to(self.device)

    def _check_room(self) -> None:
        """Check that the whole model has room in memory.

        Raises:
            BesaError: it has none.
        """
        size, cache = sizes_of(self.decoder.model, self.seqlen, self.device)
        loaded, shared = self.decoder.folder is None, devices.shares_memory(self.device)
        needs = {self.device: cache + (0 if loaded and shared else size)}
        if not loaded and not shared:
            needs[devices.CPU] = size
        for device, need in needs.items():
            if need > (free := devices.available_bytes(device)):
                raise BesaError(
                    f"Text of the model's own (--calibration {OWN}) needs the whole model in memory, {need / 1e9:.1f} "
                    f"GB on {device}, where {free / 1e9:.1f} GB are free: calibrate on other text, such as {MIX}."
                )

    def _too_little(self) -> BesaError:
        return BesaError(
            f"The model's answers fill too few sequences of {self.seqlen:,} tokens: use fewer --samples, or another "
            "--seqlen."
        )


def batch_of(model: PreTrainedModel, seqlen: int, device: torch.device) -> int:
    """Sequences that are written at a time; a skeleton of the model is enough."""
    room = CACHE if device.type == "cpu" else ACCELERATOR_CACHE
    return max(1, min(LARGEST, room // (_token_bytes(model) * seqlen)))


def sizes_of(model: PreTrainedModel, seqlen: int, device: torch.device) -> tuple[int, int]:
    """Bytes of the weights of a model, and of keys and values while it writes; a skeleton is enough."""
    size = model.num_parameters() * model.dtype.itemsize
    return size, batch_of(model, seqlen, device) * seqlen * _token_bytes(model)


def _token_bytes(model: PreTrainedModel) -> int:
    """Bytes of the keys and values of a token in all layers; those of a model with smaller ones are overestimated."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or channels(model) // heads
    return int(2 * config.num_hidden_layers * keys * width * model.dtype.itemsize)


def _likeliest(pieces: Sequence[Piece]) -> list[list[int]]:
    """The token ids of all pieces but the fifth with the highest perplexity, in the order of writing."""
    kept = len(pieces) * (DROPPED - 1) // DROPPED
    places = sorted(range(len(pieces)), key=lambda place: -pieces[place][1])[:kept]
    return [pieces[place][0] for place in sorted(places)]


def _told(progress: Progress, done: int, goal: float, batch: int) -> Callable[[int], None]:
    """A function that reports progress, called with the number of tokens written of each sequence of the batch."""

    def tell(step: int) -> None:
        progress(min(goal, done + step * batch), goal, "writing text of the model's own")

    return tell


@contextmanager
def _plain_settings(model: PreTrainedModel) -> Iterator[list[int]]:
    """While open, no setting of the checkpoint changes what is sampled; yields the tokens that end an answer."""
    before = model.generation_config
    ends = getattr(before, "eos_token_id", None)
    model.generation_config = GenerationConfig()
    try:
        yield [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    finally:
        model.generation_config = before


class _Sampling(LogitsProcessor):  # type: ignore[misc]
    """Draws each token by its probability, with random numbers from a generator on the CPU.

    Attributes:
        lengths_N: tokens written of each sequence, up to the one that ends it.
        likelihood_N: sum of the logarithms of their probabilities, at temperature 1.

    Args:
        starts_NS: what the sequences begin with.
        hot: number of tokens over which the temperature falls from `HOTTEST` to 1.
        ends: tokens that end a sequence.
        generator: on the CPU.
        told: called with the number of tokens written of each.
    """

    def __init__(
        self,
        starts_NS: Tensor,
        hot: int,
        ends: Sequence[int],
        generator: torch.Generator,
        told: Callable[[int], None],
    ) -> None:
        self._start, self._hot, self._generator, self._told = starts_NS.shape[1], hot, generator, told
        self._dtype = widest(starts_NS.device)
        self._ends = starts_NS.new_tensor(ends)
        self._writing_N = torch.ones_like(starts_NS[:, 0], dtype=torch.bool)
        self.lengths_N = torch.zeros_like(starts_NS[:, 0])
        self.likelihood_N = torch.zeros_like(self.lengths_N, dtype=self._dtype)

    def __call__(self, input_ids: Tensor, scores_NV: Tensor) -> Tensor:
        step = input_ids.shape[1] - self._start
        logarithms_NV = scores_NV.to(self._dtype).log_softmax(dim=-1)
        temperature = HOTTEST - (HOTTEST - 1) * step / self._hot if step < self._hot else 1.0
        summed_NV = (logarithms_NV / temperature).softmax(dim=-1).cumsum(dim=-1)
        random_N1 = torch.rand(len(scores_NV), 1, generator=self._generator, dtype=torch.float64)
        places_N1 = random_N1.to(self._dtype).to(summed_NV.device) * summed_NV[:, -1:]
        chosen_N1 = torch.searchsorted(summed_NV, places_N1, right=True).clamp(max=summed_NV.shape[1] - 1)
        self.likelihood_N += logarithms_NV.gather(1, chosen_N1)[:, 0] * self._writing_N
        self.lengths_N += self._writing_N
        self._writing_N &= ~torch.isin(chosen_N1[:, 0], self._ends)
        self._told(step + 1)
        return torch.full_like(scores_NV, -torch.inf).scatter(1, chosen_N1, 0.0)


def _kept(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """The tokens of an earlier run; None if there are none, or damaged ones."""
    try:
        with safe_open(path, "pt") as file:
            tokens_NT: Tensor = file.get_tensor(NAME)
            whole = (file.metadata() or {}).get("sha256") == _sha256(tokens_NT)
    except (OSError, SafetensorError):
        return None
    return tokens_NT if whole and tokens_NT.shape == shape else None


def _sha256(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
