"""`besa.evaluate`: the perplexity of a model, and its zero-shot accuracy."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa.counting.widening import widened
from besa.data.arguments import Bos, Count, Dtype, check_used, checked
from besa.errors import BesaError, Notice
from besa.evaluation.calibrated import calibrated_on
from besa.evaluation.perplexity import check_window
from besa.evaluation.result import Evaluation
from besa.evaluation.texts import perplexities, read_texts
from besa.evaluation.zero_shot import Questions, check_tasks, zero_shot
from besa.kernels.defaults import defaults
from besa.models.borrowing import borrowed, check_dtype_of_caller, check_memory_of_caller, tokenizer_of_caller
from besa.models.bos import bos_token
from besa.models.finding import find_blocks
from besa.models.limits import positions
from besa.models.loading import commit, load_tokenizer
from besa.models.source import fingerprint, locate
from besa.progress import Progress, silent
from besa.record import RunRecord, now
from besa.runtime.sparse_models import load_source
from besa.system.devices import resolve_device
from besa.system.machine import versions

ROUNDED = 0.2  # more zeros than this share are not of rounding alone: to 4 bits makes some 12 %


@checked
def evaluate(
    model: str | Path | PreTrainedModel,
    texts: Sequence[str] = (),
    *,
    data: Mapping[str, str | Path] | None = None,
    window: int | Sequence[int] | None = None,
    max_windows: Count | None = None,
    tasks: Sequence[str] = (),
    limit: Count | None = None,
    hub: bool = False,
    bos: Bos = "auto",
    batch: Count | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Measure the perplexity of a model on texts, each cut into non-overlapping windows, and its zero-shot accuracy.

    Ranks share windows and questions: each has the model on its own device, and all return the same numbers.

    Args:
        model: as in `compress`.
        texts: ``wikitext2``, ``ptb`` and ``c4``, the test sets of the papers under their protocols; ``domains``, or
            of these ``web``, ``encyclopedia``, ``code``, ``technical`` and ``languages``, which are embedded and never
            calibrated on; or ``wiki`` (embedded), files and ``hf:<dataset>``, whose documents are joined by blank
            lines. The keys of results are these names, or the stems of files.
        data: local files of test sets by name; the others come from the Hugging Face Hub.
        window: tokens of a window, or several such lengths; by default 2048, which published numbers use, or as many
            as the model has positions.
        max_windows: use only this number of windows from the beginning of each text.
        tasks: zero-shot tasks, as in `Questions.of`.
        limit: as in `zero_shot`.
        hub: as in `Questions.of`.
        bos: whether each window begins with the token that begins a text, as in `compress`; for tasks, as in
            `Questions.of`.
        batch: windows in a forward pass, by default as many as have 2048 tokens; for tasks, answers.
        tokenizer: needed with a loaded model; otherwise the model's own.
        device: as in `compress`; the whole model is moved there.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``; a loaded model keeps its own.
        trust_remote_code: run model code that comes with the checkpoint.
        progress: called with (windows done, number of windows, perplexity so far) for each text, likewise for tasks.

    Raises:
        BesaError: bad input, an argument that is not used, a window longer than the model allows, a token without an
            embedding, a text shorter than one window, or an output that is not finite.
    """
    check_used("--tasks", tasks, {"--limit": limit, "--hub": hub})
    check_used("--ppl", texts, {"--window": window, "--max-windows": max_windows})
    device = resolve_device(device)
    parts, windows = read_texts(texts, data or {}, progress), _windows(window)
    if not parts and not tasks:
        raise BesaError("There is nothing to evaluate: name a text (--ppl) or zero-shot tasks (--tasks).")
    check_tasks(tasks)
    opened = _opened(model, tokenizer, device, dtype, trust_remote_code, progress)
    began, sparsity = time.perf_counter(), opened.sparsity
    room, first = positions(opened.model), bos_token(bos, opened.tokenizer, opened.model.config)
    windows = windows or [room.usual]
    notes = [note for length in windows for note in room.checked(length, "--window")] if parts else []
    asked = Questions.of(opened.tokenizer, tasks, hub=hub, bos=bos, progress=progress) if tasks else None
    answers, read = None, (opened.model, opened.tokenizer)
    with defaults(), borrowed(opened.model, device), widened(opened.model.dtype, device):
        by_window = perplexities(*read, parts, windows, max_windows, batch, first, progress)
        if asked is not None:
            answers = zero_shot(opened.model, asked, limit=limit, batch=batch, progress=progress)
    details = by_window.pop(windows[0])
    found = [
        f"The model was calibrated on documents of {part.name}: other texts tell more of what is left."
        for part in parts
        if opened.record and calibrated_on(str((data or {}).get(part.name, part.source)), part.beginning, opened.record)
    ]
    found += [
        f"{accuracy.cut:,} answers of {task} were scored without the beginning of their question, which is longer than "
        "the model takes."
        for task, accuracy in (answers.tasks if answers is not None else {}).items()
        if accuracy.cut
    ]
    for note in found:
        warnings.warn(note, Notice, stacklevel=2)
    return Evaluation(
        model=opened.name,
        revision=opened.revision,
        fingerprint=opened.fingerprint,
        dtype=str(opened.model.dtype).removeprefix("torch."),
        perplexity={text: result.perplexity for text, result in details.items()},
        window=windows[0],
        details=details,
        other_windows=by_window,
        sources={part.name: part.source for part in parts},
        beginnings={part.name: part.beginning for part in parts},
        max_windows=max_windows,
        notes=[*notes, *found],
        bos=bos,
        zero_shot=answers,
        sparsity=sparsity,
        pruned=opened.record.created if opened.record is not None else None,
        seconds=time.perf_counter() - began,
        created=now(),
        versions=versions(),
    )


@dataclass(frozen=True)
class _Opened:
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
        entry = getattr(self.model.config, "besa", {})
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


def _opened(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
    dtype: str,
    trust_remote_code: bool,
    progress: Progress,
) -> _Opened:
    """The model of an argument; arguments and errors as of `evaluate`."""
    if isinstance(model, PreTrainedModel):
        check_dtype_of_caller(model, dtype)
        check_memory_of_caller(model, offloaded=True)
        return _Opened(model, tokenizer_of_caller(tokenizer), model.name_or_path, commit(model))
    source = locate(model, progress, trust_remote_code=trust_remote_code).local(progress)
    loaded = load_source(source, device, dtype)
    record = None
    with suppress(BesaError):  # no record of ours
        record = RunRecord.of(Path(source.location)) if source.gguf is None else None  # a folder's is not of the file
    return _Opened(
        loaded, tokenizer or load_tokenizer(source), source.base, source.revision, fingerprint(source), record
    )


def _windows(window: int | Sequence[int] | None) -> Sequence[int]:
    """The given lengths of windows; empty for the default of the model.

    Raises:
        BesaError: the list is empty, or a length is below 2.
    """
    if window is None:
        return ()
    lengths = [window] if isinstance(window, int) else window
    if not lengths:
        raise BesaError("No length of a window is given: published numbers use 2048 tokens.")
    for length in lengths:
        check_window(length)
    return lengths
