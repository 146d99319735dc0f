"""`besa.evaluate`: the perplexity of a model, and its zero-shot accuracy."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa.counting.precision import dtype_name
from besa.counting.widening import widened
from besa.data.arguments import Bos, Count, Dtype, check_used, checked
from besa.errors import BesaError, Notice
from besa.evaluation.calibrated import calibrated_on
from besa.evaluation.opened import Opened
from besa.evaluation.perplexity import check_window
from besa.evaluation.result import Evaluation
from besa.evaluation.texts import Text, perplexities, read_texts
from besa.evaluation.zero_shot import Questions, ZeroShot, check_tasks, zero_shot
from besa.kernels.defaults import defaults
from besa.models.borrowing import borrowed, check_dtype_of_caller, check_memory_of_caller, tokenizer_of_caller
from besa.models.bos import bos_token
from besa.models.limits import positions
from besa.models.loading import commit, load_tokenizer
from besa.models.source import fingerprint, locate
from besa.progress import Progress, silent
from besa.record import RunRecord, now
from besa.runtime.sparse_models import load_source
from besa.system.devices import resolve_device
from besa.system.machine import versions


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
    data = data or {}
    parts, windows = read_texts(texts, data, progress), _windows(window)
    if not parts and not tasks:
        raise BesaError("There is nothing to evaluate: name a text (--ppl) or zero-shot tasks (--tasks).")
    check_tasks(tasks)
    opened = _opened(model, tokenizer, device, dtype, trust_remote_code, progress)
    began, sparsity = time.perf_counter(), opened.sparsity
    room, first = positions(opened.model), bos_token(bos, opened.tokenizer, opened.model.config)
    windows = windows or [room.usual]
    notes = [note for length in windows for note in room.checked(length, "--window")] if parts else []
    asked = Questions.of(opened.tokenizer, tasks, hub=hub, bos=bos, progress=progress) if tasks else None
    with defaults(), borrowed(opened.model, device), widened(opened.model.dtype, device):
        by_window = perplexities(opened.model, opened.tokenizer, parts, windows, max_windows, batch, first, progress)
        answers = zero_shot(opened.model, asked, limit=limit, batch=batch, progress=progress) if asked else None
    details = by_window.pop(windows[0])
    found = _notes(parts, data, opened.record, answers)
    for note in found:
        warnings.warn(note, Notice, stacklevel=2)
    return Evaluation(
        model=opened.name,
        revision=opened.revision,
        fingerprint=opened.fingerprint,
        dtype=dtype_name(opened.model.dtype),
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


def _opened(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
    dtype: str,
    trust_remote_code: bool,
    progress: Progress,
) -> Opened:
    """The model of an argument; arguments and errors as of `evaluate`."""
    if isinstance(model, PreTrainedModel):
        check_dtype_of_caller(model, dtype)
        check_memory_of_caller(model, offloaded=True)
        return Opened(model, tokenizer_of_caller(tokenizer), model.name_or_path, commit(model))
    source = locate(model, progress, trust_remote_code=trust_remote_code).local(progress)
    loaded = load_source(source, device, dtype)
    record = RunRecord.known(Path(source.location)) if source.gguf is None else None  # a folder's is not of the file
    return Opened(
        loaded, tokenizer or load_tokenizer(source), source.base, source.revision, fingerprint(source), record
    )


def _notes(
    parts: Sequence[Text], data: Mapping[str, str | Path], record: RunRecord | None, answers: ZeroShot | None
) -> list[str]:
    """What to know about the numbers: texts that the model was calibrated on, and questions that were cut.

    Args:
        parts: the texts.
        data: local files of test sets, by name.
        record: of the run that pruned the model.
        answers: to zero-shot tasks.
    """
    notes = [
        f"The model was calibrated on documents of {part.name}: other texts tell more of what is left."
        for part in parts
        if record and calibrated_on(str(data.get(part.name, part.source)), part.beginning, record)
    ]
    notes += [
        f"{accuracy.cut:,} answers of {task} were scored without the beginning of their question, which is longer than "
        "the model takes."
        for task, accuracy in (answers.tasks if answers is not None else {}).items()
        if accuracy.cut
    ]
    return notes


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
