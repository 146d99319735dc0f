"""`besa.compress`: a model is opened, calibrated, pruned by a recipe, and written with the record of the run."""

from __future__ import annotations

import time
import warnings
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import InstanceOf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa.api.calibrating import Asked
from besa.api.choosing import check_coded, chosen, default_batch
from besa.checkpoint.opening import open_decoder
from besa.checkpoint.provenance import earlier, label, staying
from besa.checkpoint.writer import finish
from besa.counting.widening import widened
from besa.data.arguments import Bos, Bytes, Count, Dtype, Length, Samples, checked
from besa.data.calibration import Calibration
from besa.data.mixture import MIX
from besa.data.seeds import check_seed
from besa.errors import BesaError, Notice
from besa.kernels.defaults import defaults
from besa.methods.recipe import Recipe
from besa.methods.targets.budgets import budgets
from besa.models.activations import Room
from besa.models.blocks import Block
from besa.models.borrowing import borrowed
from besa.models.finding import left_dense
from besa.models.loading import load_model
from besa.models.mixtures import Fewer
from besa.models.source import Source, check_apart, locate
from besa.models.streaming import Decoder
from besa.planning import check_suits, coded_bytes, few_tokens, whole_disk_bytes
from besa.progress import Progress, silent
from besa.pruning import Resources, Run, drop_experts, prune_model, smaller
from besa.record import PASSED_NAMES, BlockRecord, PassedThrough, RunRecord, now
from besa.runtime.own_text import Author
from besa.storage.journal import Journal, journal_for
from besa.storage.names import path_of
from besa.storage.writing import check_space
from besa.system import memory, ranks
from besa.system.devices import check_dtype, resolve_device
from besa.system.machine import machine, versions


@dataclass
class Compressed:
    """A pruned model, with the tokenizer it was calibrated with and the record of the run.

    Attributes:
        tokenizer: of the model.
        record: of the run.
        out: folder of the checkpoint, None if none was written.
    """

    tokenizer: PreTrainedTokenizerBase
    record: RunRecord
    _model: PreTrainedModel | None
    out: Path | None
    _trusted: bool = False

    @property
    def model(self) -> PreTrainedModel:
        """The pruned model; a model that was pruned from disk to disk is loaded on first access."""
        if self._model is None:
            self._model = load_model(locate(str(self.out), trust_remote_code=self._trusted))
        return self._model


@checked
def compress(
    model: str | Path | PreTrainedModel,
    recipe: InstanceOf[Recipe] | str | Path,
    calibration: InstanceOf[Calibration] | str = MIX,
    *,
    out: str | Path | None = None,
    sparsity: float | None = None,
    samples: Samples = 128,
    seqlen: Length | None = None,
    bos: Bos = "auto",
    chat: bool = False,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device = "auto",
    dtype: Dtype = "auto",
    batch: Count | None = None,
    activation_budget: Bytes | None = None,
    resume: bool = False,
    dequantized: bool = False,
    trust_remote_code: bool = False,
    command: list[str] | None = None,
    progress: Progress = silent,
) -> Compressed:
    """Prune a causal decoder block by block (Algorithm 1 of the paper) to an exact sparsity.

    Args:
        model: Hugging Face id, also with a branch, a tag or a commit (``ORGANISATION/NAME@REVISION``), local folder,
            .gguf file, ``smollm2`` (embedded), or a loaded model, which is pruned in place; its device, mode and
            gradients stay as they are.
        recipe: a `Recipe`, the name of a shipped one (``besa``, ``wanda``, …), or a YAML file.
        calibration: token batches, or the text to sample them from: ``c4``, ``wiki``, ``code``, ``technical``,
            ``multilingual`` (embedded), a file, ``hf:<dataset>``, ``mix`` (equal shares of the embedded ones) or
            ``self`` (what the dense model writes, which must have room in memory); or several of these by weight,
            such as ``self:0.5,c4:0.5``.
        out: folder to write the checkpoint and `besa_run.json` to; must not exist. A model given by name then stays on
            the disk, with one block in memory at a time, and finished blocks are kept in a journal.
        sparsity: share of the prunable weights to set to zero, in [0, 1); replaces the recipe's.
        samples: number of calibration sequences, if `calibration` is a text.
        seqlen: tokens of a calibration sequence, if `calibration` is a text; by default 2048, or as many as the model
            has positions.
        bos: whether each calibration sequence begins with the token that begins a text, if `calibration` is a text:
            ``yes``, ``no``, or ``auto``, which follows the tokenizer, but means no for Llama and OPT.
        chat: render texts as dialogues in the tokenizer's chat template, if `calibration` is a text; of ``self``, the
            model answers. Such a sequence begins with a BOS token where template or `bos` put one.
        seed: of the calibration sample and of the learning order; a repeated run on the same CPU with the same number
            of threads is bit-equal. On a GPU, gradients of attention are added up in an order that may differ.
        tokenizer: needed with a loaded model; otherwise the model's own.
        device: where to compute: ``cpu``, ``cuda``, ``cuda:N``, ``mps``, ``xpu``, or ``auto``, the first CUDA device
            that torch can use, else the CPU. One block at a time is moved there.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``; a loaded model keeps its own.
        batch: calibration sequences in a forward pass; by default about 2048 tokens, on a GPU 8192.
        activation_budget: bytes of hidden states on the device, and as many in memory of the host; what has room in
            neither is in files. By default a quarter of the free memory of a GPU, and half of that of the host.
        resume: continue an interrupted run towards `out`; on a CPU with the same number of threads, the result is
            bit-equal to that of an uninterrupted run.
        dequantized: write quantised weights as dense numbers instead of codes.
        trust_remote_code: run model code that comes with the checkpoint.
        command: what the user typed, for the record.
        progress: called with (blocks done, number of blocks, state) as the run goes.

    Raises:
        BesaError: bad input or a refused situation, in one sentence; nothing is written then.
    """
    began = time.perf_counter()
    device = resolve_device(device)
    memory.reset_peak(device)
    check_seed(seed)
    loaded = isinstance(model, PreTrainedModel)
    if resume and loaded:
        raise BesaError("A run with a loaded model cannot be resumed, as the model has no identity: give its path.")
    recipe = chosen(recipe, sparsity)
    check_coded(dequantized, recipe)
    out = path_of(out) if out is not None else None
    if isinstance(model, str | Path) and out is not None:
        check_apart(model, out)
    lent = borrowed(model) if isinstance(model, PreTrainedModel) else nullcontext()
    with ExitStack() as stack:
        stack.enter_context(defaults())
        stack.enter_context(lent)
        journal = stack.enter_context(_journal_of_first(out, resume))
        source = _located(model, trust_remote_code, progress)
        decoder, tokenizer, identity = open_decoder(source, tokenizer, dtype, out is not None)
        check_dtype(decoder.model.dtype, device)
        stack.enter_context(widened(decoder.model.dtype, device))
        begun = ranks.from_first(journal.begun or {} if journal is not None else {})
        author = partial(Author, decoder, source, tokenizer, identity, chat=chat, device=device, dtype=dtype)
        asked = Asked(calibration, samples, seqlen, bos, chat, seed)
        length, as_codes = asked.length(decoder.model), out is not None and not dequantized
        check_suits(decoder.model, decoder.blocks, recipe, length, device, as_codes=as_codes)
        calibration, notes = asked.drawn(decoder.model, tokenizer, author, progress)
        recipe = recipe.settled(ranks.count(), calibration.samples, begun.get("recipe", {}))
        training_set, further = asked.training_set(calibration, recipe.distill, decoder.model, tokenizer, progress)
        batch = batch or begun.get("batch") or default_batch(calibration.samples, calibration.seqlen, device)
        folder = journal.folder if journal is not None else None
        resources = _resources(min(calibration.samples, batch), device, activation_budget, folder, not dequantized)
        run = Run(
            decoder=decoder,
            recipe=recipe,
            calibration=calibration,
            training_set=training_set,
            seed=seed,
            resources=resources,
            journal=journal,
            progress=progress,
            began=began,
        )
        fewer = smaller(decoder.model, decoder.blocks, recipe)
        notes = [*notes, *further, *_begin(run, identity, fewer)]
        run, record = _pruned(run, identity, fewer, notes, command)
        if out is not None:
            _write(run, record, tokenizer, out)
        ranks.wait()
    if out is not None and not loaded:
        return Compressed(tokenizer, record, None, out, trust_remote_code)
    return Compressed(tokenizer, record, _relabelled(run.decoder, record), out, trust_remote_code)


def _journal_of_first(out: Path | None, resume: bool) -> AbstractContextManager[Journal | None]:
    """While open, the journal of a run towards `out`; None without a folder, and on all ranks but the first.

    Arguments and errors as of `journal_for`.
    """
    return journal_for(out, resume) if out is not None and ranks.is_first() else nullcontext()


def _located(
    model: str | Path | PreTrainedModel, trust_remote_code: bool, progress: Progress
) -> Source | PreTrainedModel:
    """The model of an argument, with its files on this machine."""
    if isinstance(model, PreTrainedModel):
        return model
    return locate(model, progress, trust_remote_code=trust_remote_code).local(progress)


def _resources(
    batch: int, device: torch.device, activation_budget: int | None, folder: Path | None, codes: bool
) -> Resources:
    """What a run computes with, where there is room for hidden states.

    Args:
        batch: sequences in a forward pass.
        device: where to compute.
        activation_budget: as of `compress`.
        folder: for hidden states that have no room in memory; None without one.
        codes: whether quantised weights are written as codes.
    """
    memory.trim()
    return Resources(batch, device, Room(device, activation_budget, folder), codes=codes)


def _begin(run: Run, identity: dict[str, Any], fewer: Fewer | None) -> list[str]:
    """Check before the work that the disk is large enough, and begin the journal.

    Args:
        run: its decoder is dense.
        identity: of the model.
        fewer: what it will be without the experts that are dropped, if any are.

    Returns:
        Notes for the user, which are shown too: that calibration tokens are few, and on each of the other circumstances
        that parts of the run were made under.

    Raises:
        BesaError: it is not, or the journal was begun by another run.
    """
    shapes = run.decoder if fewer is None else fewer
    pruned = _prunable(shapes.blocks, run.recipe)
    notes = few_tokens(run.recipe, shapes.blocks, pruned, run.calibration.samples, run.calibration.seqlen)
    if run.journal is not None:
        notes += _begin_journal(run, run.journal, identity, shapes, pruned)
    for note in notes:
        warnings.warn(note, Notice, stacklevel=2)
    return notes


def _begin_journal(
    run: Run,
    journal: Journal,
    identity: dict[str, Any],
    shapes: Decoder | Fewer,
    pruned: set[str],
) -> list[str]:
    """Begin the journal, and check that the disk is enough.

    Args:
        run: its decoder is dense.
        journal: of the run.
        identity: of the model.
        shapes: of the model, without experts that are dropped.
        pruned: full names of the linears that are pruned.

    Returns:
        A note on each of the other circumstances that parts of the run were made under.

    Raises:
        BesaError: it is not, or the journal was begun by another run.
    """
    model, blocks, recipe = shapes.model, shapes.blocks, run.recipe
    item, coding = model.dtype.itemsize, recipe.quantization.coding
    size = model.num_parameters() * item + run.decoder.unbuilt_bytes
    if coding is not None and run.resources.codes:
        size = coded_bytes(size, item, blocks, pruned, coding)
    origin = {"versions": versions(), "machine": machine(run.resources.device), "ranks": ranks.count()}
    differences = journal.begin(_decisive(run, identity), origin)
    check_space(journal.folder, whole_disk_bytes(model, blocks, recipe, size) - journal.bytes)
    return [
        f"A part of the run was made with {difference}: the result may differ from that of an uninterrupted run."
        for difference in differences
    ]


def _prunable(blocks: list[Block], recipe: Recipe) -> set[str]:
    """Full names of the linears that the recipe prunes."""
    return {name for of_unit in budgets(blocks, recipe) for budget in of_unit for name in budget.names}


def _pruned(
    run: Run, identity: dict[str, Any], fewer: Fewer | None, notes: list[str], command: list[str] | None
) -> tuple[Run, RunRecord]:
    """Drop experts, prune the blocks, distil: whatever the recipe asks for.

    Args:
        run: its decoder is dense.
        identity: of the model.
        fewer: as of `_begin`.
        notes: for the user, so far.
        command: what the user typed.

    Returns:
        The run with the decoder that is left, and its record.
    """
    began, before = time.perf_counter(), earlier(run.decoder)
    dropped = drop_experts(run, fewer)
    left = replace(run, decoder=dropped.decoder, dense=dropped.dense)
    blocks, distilling = prune_model(left)
    return left, RunRecord(
        command=command,
        model=identity,
        blocks=blocks,
        distilling=distilling,
        mixtures=dropped.mixtures,
        seconds=left.journal.seconds if left.journal is not None else time.perf_counter() - began,
        notes=[*notes, *_left_out(run.decoder, left.decoder)],
        earlier=before,
        **_totals(blocks, left.decoder, identity["parameters"], fewer),
        **_circumstances(left),
    )


def _write(run: Run, record: RunRecord, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write the checkpoint, on the rank that has the journal; errors as of `finish`."""
    if run.journal is not None:
        coding = run.recipe.quantization.coding if run.resources.codes else None
        finish(run.journal, run.decoder, tokenizer, record, out, quantization=coding)


def _relabelled(decoder: Decoder, record: RunRecord) -> PreTrainedModel:
    """The pruned model in memory, whose configuration tells of this run if it told of one before."""
    pruned = decoder.model
    if hasattr(pruned.config, "besa"):
        pruned.config.besa = label(record) | staying(decoder, {})
    return pruned


def _decisive(run: Run, identity: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides the result of a run; a journal is resumed only if it is the same."""
    return {
        "recipe": run.recipe.model_dump(mode="json"),
        "model": identity,
        "calibration": run.calibration.describe(),
        "study": run.training_set.calibration.describe() if run.training_set is not None else None,
        "seed": run.seed,
        "batch": run.resources.batch,
        "device": run.resources.device.type,
        "dequantized": not run.resources.codes,
    }


def _circumstances(run: Run) -> dict[str, Any]:
    """The fields of a `RunRecord` on how and where it ran."""
    device = run.resources.device
    return {
        "created": now(),
        "recipe": run.recipe.model_dump(mode="json"),
        "seed": run.seed,
        "batch": run.resources.batch,
        "calibration": run.calibration.describe(),
        "versions": versions(),
        "machine": machine(device),
        "ranks": ranks.count(),
        "machines": max(1, ranks.count() // ranks.here()),
        "dequantized": run.recipe.quantization.coding is not None and not run.resources.codes,
        "peak_memory_bytes": max(ranks.all_of(memory.peak_bytes())),
        "peak_gpu_memory_bytes": max(ranks.all_of(memory.peak_gpu_bytes(device) or 0)) or None,
        "restored_blocks": run.journal.restored if run.journal else 0,
    }


def _left_out(dense: Decoder, pruned: Decoder) -> list[str]:
    """A note on tensors that are not written because whole experts went; none where all are."""
    left_out = len(dense.unbuilt) - len(pruned.unbuilt)
    if not left_out:
        return []
    return [f"{left_out:,} tensors of layers that predict further tokens are left out with the experts."]


def _totals(blocks: list[BlockRecord], decoder: Decoder, parameters: int, fewer: Fewer | None) -> dict[str, Any]:
    """The fields of a `RunRecord` that add up its blocks, and those on the weights that were not pruned.

    Args:
        blocks: of the pruned model.
        decoder: of the pruned model.
        parameters: of the dense model.
        fewer: what it was without the experts that were dropped, if any were.
    """
    weights, zeros = sum(block.weights for block in blocks), sum(block.zeros for block in blocks)
    dropped = fewer.dropped if fewer is not None else 0
    return {
        "dropped": dropped,
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights,
        "model_sparsity": (zeros + dropped) / parameters,
        "dense": left_dense(decoder.blocks, {linear.name for block in blocks for linear in block.linears}),
        "passed_through": PassedThrough(
            tensors=len(decoder.unbuilt), bytes=decoder.unbuilt_bytes, names=decoder.unbuilt[:PASSED_NAMES]
        ),
    }
