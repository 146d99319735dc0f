"""How what is pruned, and what is planned, looks in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.text import Text

from besa.cli.tables import Whole
from besa.models.couplings import CALLED
from besa.models.structures import WHOLE, stay
from besa.planning.explaining import deciding
from besa.storage.amounts import in_words

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

    from besa.checkpoint.shrinking import Shrinking
    from besa.planning import Plan, RecipeList
    from besa.record import RunRecord

PLACES = {"device": "on the device", "host": "in memory", "file": "on disk"}  # of hidden states


def pruned(record: RunRecord, folder: Path) -> RenderableType:
    """What a run did, in a few lines."""
    errors = [block.reconstruction_error for block in record.blocks]
    gpu = f", GPU {record.peak_gpu_memory_bytes / 1e9:.2f} GB" if record.peak_gpu_memory_bytes else ""
    unreached = (
        f"\n{record.unreached} matrices met no calibration token (experts) or zeros alone: pruned by weights alone"
        if record.unreached
        else ""
    )
    several = f" of one of {record.ranks} ranks" if record.ranks > 1 else ""
    passed = record.passed_through
    unbuilt = (
        f"\n{passed.tensors:,} tensors that transformers does not build were passed through as they are "
        f"({passed.bytes / 1e6:,.1f} MB), such as {passed.names[0]}"
        if passed.tensors
        else ""
    )
    whole = ""
    if record.model_sparsity is not None:
        whole = f"{record.model_sparsity:.2%} of the whole model pruned; {_dense(record.dense)}\n"
    stays = "".join(f"{phrase}\n" for phrase in stay({block.index: block.structures for block in record.blocks}))
    experts = f"{_experts(*record.experts, len(record.mixtures), record.dropped)}\n" if record.experts else ""
    learned = ""
    if record.distilling is not None:
        first, best = record.distilling.losses[0], min(record.distilling.losses)
        learned = f"\nloss on held-out tokens {first:.4f} nats before distilling, {best:.4f} after"
    return Text(
        f"{folder}: {record.zeros:,} of {record.weights:,} prunable weights are zero ({record.sparsity:.4%})\n"
        f"{experts}{stays}{whole}"
        f"recipe {record.recipe['name']}, {record.seconds:,.0f} s, "
        f"peak memory {record.peak_memory_bytes / 1e9:.2f} GB{gpu}{several}\n"
        f"reconstruction error {errors[0]:.4f} in the first block, {errors[-1]:.4f} in the last"
        f"{learned}{unreached}{unbuilt}"
    )


def planned(plan: Plan) -> RenderableType:
    """What a run will take."""
    table = Whole(title=plan.model, show_header=False)
    table.add_row("architecture", f"{plan.architecture}, {plan.blocks} blocks, {plan.parameters:,} parameters")
    if plan.experts is not None:
        table.add_row("experts", _experts(*plan.experts, plan.mixtures, plan.dropped))
    share = plan.zeros / plan.prunable_weights
    table.add_row("prunable weights", f"{plan.prunable_weights:,}, of which {plan.zeros:,} go ({share:.2%})")
    if plan.structures:
        stays = [f"{after:,} of {before:,} {WHOLE[kind]} stay" for kind, (before, after) in plan.structures.items()]
        table.add_row("whole structures", ", ".join(stays))
    table.add_row("whole model", f"{plan.model_sparsity:.2%} of all parameters go; {_dense(plan.dense)}")
    each, passed = "", "the calibration set"
    if plan.ranks > 1:
        each, passed = " of each rank", "the sequences of a rank"
        sent = sum(plan.traffic_bytes.values())
        phases = ", ".join(f"{phase} {size / 1e6:.2g}" for phase, size in plan.traffic_bytes.items())
        sequences = f"{plan.sequences:,} calibration sequence{'' if plan.sequences == 1 else 's'}"
        table.add_row("ranks", f"{plan.ranks}, each with at most {sequences}")
        table.add_row("sent by a rank", f"{sent / 1e6:,.1f} MB for a block: {phases}")
    table.add_row("memory", f"{in_words(plan.memory_bytes)} at the peak{each}")
    if plan.gpu_memory_bytes is not None:
        others = plan.gpu_memory_bytes - plan.activation_places["device"]
        table.add_row(
            "GPU memory",
            f"{in_words(plan.gpu_memory_bytes)} at the peak{each}, {in_words(others)} without activations",
        )
    if plan.distilling_bytes:
        table.add_row("distilling", f"{in_words(plan.distilling_bytes)} of it, with the whole model at once")
    places = [f"{in_words(size)} {PLACES[place]}" for place, size in plan.activation_places.items() if size]
    table.add_row("activations", f"{in_words(plan.activation_bytes)}{each} between blocks: {', '.join(places)}")
    table.add_row("disk", f"{in_words(plan.disk_bytes)} needed, {in_words(plan.checkpoint_bytes)} of it stays")
    decided = "" if plan.minutes is None else f"; {deciding(plan.minutes)} how many epochs there are"
    table.add_row("forward passes", f"{plan.forward_passes:.3g} of {passed}, a backward pass counted as two{decided}")
    if plan.writing_passes:
        table.add_row(
            "own text", f"as much as {plan.writing_passes:.3g} passes, but token by token, by the whole model"
        )
    for warning in plan.warnings:
        table.add_row("warning", warning)
    table.add_row("fits here", "yes" if plan.fits else f"no: too little {' and '.join(plan.lacking)}")
    return table


def recipes_listed(result: RecipeList) -> RenderableType:
    """The recipes: of each, what it is for, and in a line below that what it takes."""
    table = Whole(
        box=SIMPLE,
        leading=1,
        caption=f"passes: forward passes over {result.samples} sequences of {result.seqlen:,} tokens, of the blocks; "
        "`besa prune MODEL OUT --recipe NAME --explain` shows a recipe",
    )
    for column in ("recipe", "what it is for, and what it takes"):
        table.add_column(column)
    for recipe in result.recipes:
        needs = ["calibration"] * recipe.calibration + ["Gram matrices"] * recipe.gram
        needs += [f"gradients of {', '.join(recipe.gradients)}"] if recipe.gradients else []
        shown = ", ".join(needs) or "nothing"
        takes = f"passes: {recipe.passes:.3g}; needs: {shown}; in memory: {recipe.memory}"
        table.add_row(recipe.name, Text.assemble(recipe.purpose, "\n", (takes, "dim")))
    return table


def shrunk(result: Shrinking, folder: Path) -> RenderableType:
    """What shrinking did, in two lines."""
    changes = [f"{CALLED[kind]} from {before:,} to {after:,}" for kind, (before, after) in result.structures.items()]
    left = [f"{_between(each)} {CALLED[kind]}" for kind, each in result.widths.items()]
    before, after = result.blocks
    parts = [f"blocks from {before:,} to {after:,}"] if after < before else []
    parts += [f"{', '.join(changes)} in each block"] if changes else []
    parts += [f"{' and '.join(left)} are left in a block", "loading needs besa"] if left else []
    return Text(
        f"{folder}: {'; '.join(parts)}\n"
        f"weight files: from {result.file_bytes_before / 1e6:,.1f} to {result.file_bytes / 1e6:,.1f} MB"
    )


def _between(numbers: list[int]) -> str:
    """The range of the numbers of all blocks."""
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"between {least:,} and {most:,}"


def _experts(before: int, after: int, mixtures: int, parameters: int) -> str:
    """How many experts stay, and what went with the others."""
    return f"{after:,} of {before:,} experts stay in each of {mixtures:,} mixtures: {parameters:,} parameters went"


def _dense(dense: dict[str, int]) -> str:
    """What stays dense in the blocks."""
    if not dense:
        return "no matrix of the blocks is left out"
    return f"{sum(dense.values()):,} weights of the blocks stay dense: {', '.join(sorted(dense))}"
