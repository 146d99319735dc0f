"""The public functions behind the command line."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa.checkpoint.opening import open_decoder
from besa.checkpoint.rewriting import folder_of
from besa.checkpoint.writer import finish
from besa.data.arguments import Bos, Bytes, Count, Dtype, Length, Ranks, checked
from besa.data.calibration import Calibration, sample
from besa.data.mixture import OWN, parts_of
from besa.data.seeds import check_seed
from besa.data.tokens import check_known
from besa.errors import BesaError
from besa.evaluation.perplexity import check_window
from besa.evaluation.result import Evaluation
from besa.evaluation.texts import perplexities, read_texts
from besa.evaluation.zero_shot import check_tasks, zero_shot
from besa.methods.recipe import Recipe
from besa.methods.targets.budgets import budgets
from besa.models.activations import Room
from besa.models.blocks import Block, find_blocks, left_dense
from besa.models.borrowing import borrowed, tokenizer_of_caller
from besa.models.bos import bos_token
from besa.models.limits import embedding_rows, positions
from besa.models.loading import (
    commit,
    load_model,
    load_tokenizer,
    locate,
    read_config,
    refuse_quantized,
    skeleton,
)
from besa.models.mixtures import Fewer, changed
from besa.models.streaming import Decoder
from besa.planning import Outline, Plan, check_fits, whole_disk_bytes, work_out
from besa.progress import Progress, silent
from besa.pruning import Resources, Run, drop_experts, prune_model, smaller
from besa.record import PASSED_NAMES, BlockRecord, PassedThrough, RunRecord, now
from besa.runtime.chat_template import dialogue_of
from besa.runtime.own_text import Author
from besa.runtime.sparse_models import load_source
from besa.simulator import Accelerator, Simulation
from besa.simulator import simulate as simulate_checkpoint
from besa.storage.formats.container import header
from besa.storage.journal import journal_for
from besa.storage.names import path_of
from besa.storage.writing import check_space
from besa.system import memory, ranks
from besa.system.devices import check_dtype, named_device, resolve_device
from besa.system.machine import machine, versions
from besa.system.ranks import together

BATCH_TOKENS = 2048  # default tokens in a forward pass
ACCELERATOR_BATCH_TOKENS = 8192  # the same on any other device than the CPU, which needs more to be busy


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
    recipe: Recipe | str | Path,
    calibration: Calibration | str = "c4",
    *,
    out: str | Path | None = None,
    sparsity: float | None = None,
    samples: Count = 128,
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
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        batch: calibration sequences in a forward pass; by default about 2048 tokens, on a GPU 8192.
        activation_budget: bytes of hidden states on the device, and as many in memory of the host; what has room in
            neither is in files. By default a quarter of the free memory of a GPU, and half of that of the host.
        resume: continue an interrupted run towards `out`; on a CPU with the same number of threads, the result is
            bit-equal to that of an uninterrupted run.
        dequantized: write quantised weights as dense numbers instead of codes.
        trust_remote_code: run model code that comes with the checkpoint.
        command: what the user typed, for the record.
        progress: told (blocks done, blocks, state) as the run goes.

    Raises:
        BesaError: bad input or a refused situation, in one sentence; nothing is written then.
    """
    device = resolve_device(device)
    check_seed(seed)
    if resume and isinstance(model, PreTrainedModel):
        raise BesaError("A run with a loaded model cannot be resumed, as the model has no identity: give its path.")
    recipe = _chosen(recipe, sparsity)
    out = path_of(out) if out is not None else None
    lent = borrowed(model) if isinstance(model, PreTrainedModel) else nullcontext()
    with lent, journal_for(out, resume) if out and ranks.is_first() else nullcontext() as journal:
        opened = (
            model
            if isinstance(model, PreTrainedModel)
            else locate(model, progress, trust_remote_code=trust_remote_code).local(progress)
        )
        decoder, tokenizer, identity = open_decoder(opened, tokenizer, dtype, out is not None)
        check_dtype(decoder.model.dtype, device)
        begun = ranks.from_first(journal.begun or {} if journal is not None else {})
        recipe = recipe.settled(ranks.count(), begun.get("recipe", {}))
        author = partial(Author, decoder, opened, tokenizer, identity, chat=chat, device=device, dtype=dtype)
        calibration, notes = _calibration(
            calibration,
            decoder.model,
            tokenizer,
            samples=samples,
            seqlen=seqlen,
            bos=bos,
            chat=chat,
            seed=seed,
            author=author,
            progress=progress,
        )
        batch = batch or begun.get("batch") or default_batch(calibration.samples, calibration.seqlen, device)
        batch = min(calibration.samples, batch)
        fewer = smaller(decoder.model, decoder.blocks, recipe)
        shapes = decoder if fewer is None else fewer
        whole = shapes.model, shapes.blocks, _prunable(shapes.blocks, recipe), recipe
        check_fits(*whole, calibration.seqlen, device)
        if journal is not None:
            journal.begin(_decisive(recipe, identity, calibration, seed, batch, device) | {"dequantized": dequantized})
            size = shapes.model.num_parameters() * shapes.model.dtype.itemsize + decoder.unbuilt_bytes
            check_space(journal.folder, whole_disk_bytes(*whole, size) - journal.bytes)
        memory.trim()
        memory.reset_peak(device)
        began = time.perf_counter()
        room = Room(device, activation_budget, journal.folder if journal else None)
        resources = Resources(batch, device, room, codes=not dequantized)
        run = Run(decoder, recipe, calibration, None, seed, resources, journal, progress)
        dropped = drop_experts(run, fewer)
        if left_out := len(decoder.unbuilt) - len(dropped.decoder.unbuilt):
            notes.append(f"{left_out:,} tensors of layers that predict further tokens are left out with the experts.")
        decoder = dropped.decoder
        blocks, distilling = prune_model(replace(run, decoder=decoder, dense=dropped.dense))
        record = RunRecord(
            created=now(),
            command=command,
            recipe=recipe.model_dump(mode="json"),
            seed=seed,
            model=identity,
            calibration=calibration.describe(),
            versions=versions(),
            machine=machine(device),
            blocks=blocks,
            distilling=distilling,
            mixtures=dropped.mixtures,
            **_totals(blocks, decoder, identity["parameters"], fewer),
            seconds=time.perf_counter() - began,
            ranks=ranks.count(),
            peak_memory_bytes=max(ranks.all_of(memory.peak_bytes())),
            peak_gpu_memory_bytes=max(ranks.all_of(memory.peak_gpu_bytes(device) or 0)) or None,
            notes=notes,
            restored_blocks=journal.restored if journal else 0,
        )
        if journal and out:
            coding = None if dequantized else recipe.quantization.coding
            finish(journal, decoder, tokenizer, record, out, quantization=coding)
        ranks.wait()
    in_place = out is None or isinstance(model, PreTrainedModel)
    return Compressed(tokenizer, record, decoder.model if in_place else None, out, trust_remote_code)


def _calibration(
    calibration: Calibration | str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seqlen: int | None,
    bos: str,
    chat: bool,
    seed: int,
    author: Callable[..., Author],
    progress: Progress,
) -> tuple[Calibration, list[str]]:
    """Token batches that the model can read, and notes on their length; arguments as of `compress` and `Author`."""
    room, rows = positions(model), embedding_rows(model)
    if isinstance(calibration, Calibration):
        notes = room.checked(calibration.seqlen, "A calibration sequence of")
        check_known(calibration.tokens_NT, rows, tokenizer)
        return calibration, notes
    seqlen = room.usual if seqlen is None else seqlen
    notes, first = room.checked(seqlen, "--seqlen"), bos_token(bos, tokenizer, model.config)
    drawn = sample(
        calibration,
        tokenizer,
        samples,
        seqlen,
        seed,
        progress,
        bos=first,
        rows=rows,
        dialogue=dialogue_of(tokenizer) if chat else None,
        author=author(seqlen=seqlen, seed=seed, bos=first, progress=progress),
    )
    return drawn, notes


def _prunable(blocks: list[Block], recipe: Recipe) -> set[str]:
    """Full names of the linears that the recipe prunes."""
    return {name for of_unit in budgets(blocks, recipe) for budget in of_unit for name in budget.names}


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


def _chosen(recipe: Recipe | str | Path, sparsity: float | None) -> Recipe:
    """The recipe of an argument, at another sparsity if one is given."""
    if not isinstance(recipe, Recipe):
        return Recipe.load(recipe, sparsity)
    return recipe if sparsity is None else recipe.at(sparsity)


def _decisive(
    recipe: Recipe, identity: dict[str, Any], calibration: Calibration, seed: int, batch: int, device: torch.device
) -> dict[str, Any]:
    """Everything that decides the result of a run; a journal is resumed only if it is the same."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "model": identity,
        "calibration": calibration.describe(),
        "seed": seed,
        "batch": batch,
        "device": device.type,
    }


@checked
def plan(
    model: str | Path,
    recipe: Recipe | str | Path = "besa",
    *,
    out: str | Path = ".",
    sparsity: float | None = None,
    calibration: str = "c4",
    samples: Count = 128,
    seqlen: Length | None = None,
    device: str | torch.device = "auto",
    dtype: Dtype = "auto",
    batch: Count | None = None,
    activation_budget: Bytes | None = None,
    ranks: Ranks = 1,
    trust_remote_code: bool = False,
) -> Plan:
    """Estimate from the model's configuration what `compress` will take.

    Args:
        model: Hugging Face id, of which no weights are downloaded, or local folder; a config.json is enough.
        recipe: as in `compress`.
        out: where the checkpoint would be written.
        sparsity: as in `compress`.
        calibration: as in `compress`; what the model writes itself takes passes and memory.
        samples: as in `compress`.
        seqlen: as in `compress`.
        device: as in `compress`; this machine need not have it.
        dtype: as in `compress`.
        batch: as in `compress`.
        activation_budget: as in `compress`; each rank has so much.
        ranks: processes that torchrun would start on this machine, one for each device.
        trust_remote_code: as in `compress`.

    Raises:
        BesaError: the configuration cannot be read or is of no decoder that besa can prune.
    """
    device = named_device(device)
    source = locate(model, trust_remote_code=trust_remote_code).local(weights=False)
    if source.gguf:
        raise BesaError(f"{model} is a .gguf file, which is loaded whole: plan for a folder of safetensors.")
    if header(folder_of(source)) is not None:
        raise BesaError(f"{source.name} is packed: make it dense with `besa unpack` first.")
    config = read_config(source)
    refuse_quantized(source, config)
    config.dtype = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32
    empty = skeleton(source, config)
    room = positions(empty)
    seqlen = room.usual if seqlen is None else seqlen
    room.checked(seqlen, "--seqlen")
    with together(0, ranks):
        batch = batch or default_batch(samples, seqlen, device)
    recipe = _chosen(recipe, sparsity).settled(ranks, {})
    fewer = smaller(empty, find_blocks(empty), recipe)
    if fewer is not None:
        empty = skeleton(source, changed(config, fewer.settings))
    return work_out(
        Outline(
            source.name,
            empty,
            find_blocks(empty),
            recipe,
            samples=samples,
            seqlen=seqlen,
            batch=min(samples, batch),
            device=device,
            activation_budget=activation_budget,
            folder=path_of(out),
            fewer=fewer,
            ranks=ranks,
            own=float(sum(part.share for part in parts_of(calibration) if part.source == OWN)),
        )
    )


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
        tasks: zero-shot tasks, as in `zero_shot`.
        limit: as in `zero_shot`.
        hub: as in `zero_shot`.
        bos: whether each window begins with the token that begins a text, as in `compress`; for tasks, as in
            `zero_shot`.
        batch: windows in a forward pass, by default as many as have 2048 tokens; for tasks, answers.
        tokenizer: needed with a loaded model; otherwise the model's own.
        device: as in `compress`; the whole model is moved there.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: run model code that comes with the checkpoint.
        progress: told (windows done, windows, perplexity so far) for each text, and likewise for tasks.

    Raises:
        BesaError: bad input, a window longer than the model allows, a token without an embedding, a text shorter than
            one window, or an output that is not finite.
    """
    device = resolve_device(device)
    parts, windows = read_texts(texts, data or {}, progress), _windows(window)
    if not parts and not tasks:
        raise BesaError("There is nothing to evaluate: name a text (--ppl) or zero-shot tasks (--tasks).")
    check_tasks(tasks)
    if isinstance(model, PreTrainedModel):
        tokenizer = tokenizer_of_caller(tokenizer)
        loaded, name, revision = model, model.name_or_path, commit(model)
    else:
        source = locate(model, progress, trust_remote_code=trust_remote_code).local(progress)
        loaded, name, revision = load_source(source, device, dtype), source.base, source.revision
        tokenizer = tokenizer or load_tokenizer(source)
    began = time.perf_counter()
    room, first = positions(loaded), bos_token(bos, tokenizer, loaded.config)
    windows = windows or [room.usual]
    notes = [note for length in windows for note in room.checked(length, "--window")] if parts else []
    answers = None
    with borrowed(loaded, device):
        by_window = perplexities(loaded, tokenizer, parts, windows, max_windows, batch, first, progress)
        if tasks:
            answers = zero_shot(loaded, tokenizer, tasks, limit=limit, hub=hub, batch=batch, bos=bos, progress=progress)
    details = by_window.pop(windows[0])
    return Evaluation(
        model=name,
        revision=revision,
        perplexity={text: result.perplexity for text, result in details.items()},
        window=windows[0],
        details=details,
        other_windows=by_window,
        sources={part.name: part.source for part in parts},
        beginnings={part.name: part.beginning for part in parts},
        notes=notes,
        bos=bos,
        zero_shot=answers,
        sparsity=getattr(loaded.config, "besa", {}).get("sparsity"),
        seconds=time.perf_counter() - began,
        created=now(),
        versions=versions(),
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


@checked
def simulate(
    model: str | Path,
    tokens: Sequence[Count] = (1, 8, 32, 128, 512),
    *,
    accelerator: Accelerator | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Simulation:
    """Count the cycles that an accelerator for sparse weights would take (section 4.5 and Table 4 of the paper).

    Args:
        model: Hugging Face id, local folder (dense, pruned, or with codes), .gguf file, or ``smollm2``.
        tokens: numbers of input vectors for the figures that include memory.
        accelerator: what is simulated, by default ViTCoD.
        trust_remote_code: run model code that comes with the checkpoint.
        progress: told (blocks done, blocks, name of the block).

    Raises:
        BesaError: the model cannot be read, or a number of tokens is not positive.
    """
    source = locate(model, progress, trust_remote_code=trust_remote_code)
    return simulate_checkpoint(source, tokens, accelerator or Accelerator(), progress)


def default_batch(samples: int, seqlen: int, device: torch.device) -> int:
    """Default number of sequences in a forward pass, which keeps every device busy."""
    busy = (BATCH_TOKENS if device.type == "cpu" else ACCELERATOR_BATCH_TOKENS) // seqlen
    return max(1, min(busy, -(-samples // ranks.count())))
