"""How results look in a terminal: built here and printed by the command line."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.text import Text

from besa.checkpoint.inspection import Contents
from besa.checkpoint.packing import Packing
from besa.checkpoint.shrinking import Shrinking
from besa.checkpoint.verification import Verified
from besa.cli.tables import Whole
from besa.evaluation.domains import mean_of_domains
from besa.evaluation.result import Evaluation
from besa.evaluation.zero_shot import ZeroShot
from besa.integrations.pushing import Pushed
from besa.models.couplings import CALLED
from besa.models.kinds import shortened
from besa.models.structures import WHOLE, stay
from besa.planning import Plan, RecipeList
from besa.record import RunRecord
from besa.runtime.timings import Bench
from besa.simulator import Simulation, described
from besa.storage.names import pinned
from besa.studies.comparing import NAME, Comparison
from besa.studies.demo import Demo
from besa.studies.rows import MADE_BY, PAIRED, listed, listed_pairs

PLACES = {"device": "on the device", "host": "in memory", "file": "on disk"}  # of hidden states


def pruned(record: RunRecord, folder: Path) -> RenderableType:
    """What a run did, in a few lines."""
    errors = [block.reconstruction_error for block in record.blocks]
    gpu = f", GPU {record.peak_gpu_memory_bytes / 1e9:.2f} GB" if record.peak_gpu_memory_bytes else ""
    unreached = (
        f"\n{record.unreached} experts saw no calibration token: pruned by weights alone" if record.unreached else ""
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
        learned = (
            f"\ndivergence from the dense model on held-out tokens {first:.4f} before distilling, {best:.4f} after"
        )
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
        table.add_row("ranks", f"{plan.ranks}, each with at most {plan.sequences:,} calibration sequences")
        table.add_row("sent by a rank", f"{sent / 1e6:,.1f} MB for a block: {phases}")
    table.add_row("memory", f"{plan.memory_bytes / 1e9:.2f} GB at the peak{each}")
    if plan.gpu_memory_bytes is not None:
        others = plan.gpu_memory_bytes - plan.activation_places["device"]
        table.add_row(
            "GPU memory",
            f"{plan.gpu_memory_bytes / 1e9:.2f} GB at the peak{each}, {others / 1e9:.2f} GB without activations",
        )
    if plan.distilling_bytes:
        table.add_row("distilling", f"{plan.distilling_bytes / 1e9:.2f} GB of it, with the whole model at once")
    places = [f"{size / 1e9:.2f} GB {PLACES[place]}" for place, size in plan.activation_places.items() if size]
    table.add_row("activations", f"{plan.activation_bytes / 1e9:.2f} GB{each} between blocks: {', '.join(places)}")
    table.add_row("disk", f"{plan.disk_bytes / 1e9:.2f} GB free, {plan.checkpoint_bytes / 1e9:.2f} GB of it stays")
    table.add_row("forward passes", f"{plan.forward_passes:.3g} of {passed}, a backward pass counted as two")
    if plan.writing_passes:
        table.add_row(
            "own text", f"as much as {plan.writing_passes:.3g} passes, but token by token, by the whole model"
        )
    for warning in plan.warnings:
        table.add_row("warning", warning)
    table.add_row("fits here", "yes" if plan.fits else f"no: too little {' and '.join(plan.lacking)}")
    return table


def recipes_listed(result: RecipeList) -> RenderableType:
    """The recipes, a row each."""
    table = Whole(
        box=SIMPLE,
        caption=f"passes: forward passes over {result.samples} sequences of {result.seqlen:,} tokens, of the blocks; "
        "`besa prune MODEL OUT --recipe NAME --explain` shows a recipe",
    )
    for column in ("recipe", "passes", "needs", "in memory", "what it is for"):
        table.add_column(column)
    for recipe in result.recipes:
        needs = ["calibration"] * recipe.calibration + ["Gram matrices"] * recipe.gram
        needs += [f"gradients of {', '.join(recipe.gradients)}"] if recipe.gradients else []
        shown = ", ".join(needs) or "nothing"
        table.add_row(recipe.name, f"{recipe.passes:.3g}", shown, recipe.memory, Text(recipe.purpose))
    return table


def verified(result: Verified, folder: Path) -> RenderableType:
    """That a checkpoint is as it was written, in one line."""
    return Text(f"{folder}: {result.files} files with {result.bytes:,} bytes are as they were written")


def pushed(result: Pushed) -> RenderableType:
    """Where a checkpoint is, and what is not there."""
    lines = [f"{result.url}: {len(result.files)} files in commit {result.commit}"]
    if not result.changed:
        lines[0] += ", which was there already"
    if result.removed:
        lines.append(f"removed there, as this checkpoint has other weight files: {', '.join(result.removed)}")
    if result.left_out:
        lines.append(f"not uploaded, as no part of the checkpoint: {', '.join(result.left_out)}")
    return Text("\n".join(lines))


def _experts(before: int, after: int, mixtures: int, parameters: int) -> str:
    """How many experts stay, and what went with the others."""
    return f"{after:,} of {before:,} experts stay in each of {mixtures:,} mixtures: {parameters:,} parameters went"


def _dense(dense: dict[str, int]) -> str:
    """What stays dense in the blocks."""
    if not dense:
        return "every matrix of the blocks is pruned"
    return f"{sum(dense.values()):,} weights of the blocks stay dense: {', '.join(sorted(dense))}"


def packed(result: Packing, folder: Path) -> RenderableType:
    """What packing did, in two or three lines."""
    before, after = result.head_dense_bytes / 1e6, result.head_bytes / 1e6
    head = f"head and embeddings in eight bits: from {before:,.1f} to {after:,.1f} MB\n" if after else ""
    share = result.packed_bytes / max(1, result.dense_bytes)
    return Text(
        f"{folder}: {result.packed:,} of {result.linears:,} linears packed, from {result.dense_bytes / 1e6:,.1f} to "
        f"{result.packed_bytes / 1e6:,.1f} MB ({share:.3f} of the bytes)\n"
        f"{head}"
        f"weight files: from {result.file_bytes_before / 1e6:,.1f} to {result.file_bytes / 1e6:,.1f} MB"
    )


def shrunk(result: Shrinking, folder: Path) -> RenderableType:
    """What shrinking did, in two lines."""
    changes = [f"{CALLED[kind]} from {before:,} to {after:,}" for kind, (before, after) in result.structures.items()]
    changes += [f"{CALLED[kind]} {min(each):,} to {max(each):,}" for kind, each in result.widths.items()]
    before, after = result.blocks
    parts = [f"blocks from {before:,} to {after:,}"] if after < before else []
    parts += [f"{', '.join(changes)} in each block"] if changes else []
    parts += ["loading needs besa"] if result.widths else []
    return Text(
        f"{folder}: {'; '.join(parts)}\n"
        f"weight files: from {result.file_bytes_before / 1e6:,.1f} to {result.file_bytes / 1e6:,.1f} MB"
    )


def benched(result: Bench) -> RenderableType:
    """Tokens a second by work and model, and what each model takes."""
    reference = result.models[0].name
    speeds = Whole(
        title="tokens a second: median and quartiles",
        caption=f"×: to {reference} in its fastest form; limit: weights read at {result.bandwidth / 1e9:.1f} GB/s; "
        f"{result.rounds} rounds, {result.machine['threads']} threads",
        box=SIMPLE,
    )
    for name in ("work", "model", "form"):
        speeds.add_column(name)
    for name in ("tokens/s", "quartiles", "×", "limit", "of limit"):
        speeds.add_column(name, justify="right")
    for work in result.works():
        for model, timing, ratio in result.of(work):
            middle, low, high, limit = timing.paces()
            share = f"{timing.limit / timing.seconds:.0%}"
            speeds.add_row(work, model.name, model.form, middle, f"{low}–{high}", f"{ratio:.2f}", limit, share)
    sizes = Whole(box=SIMPLE)
    for name in ("model", "form", "dtype"):
        sizes.add_column(name)
    for name in ("file", "resident", "read by a step"):
        sizes.add_column(f"{name}, MB", justify="right")
    for model in result.models:
        resident = "" if model.resident_bytes is None else f"{model.resident_bytes / 1e6:,.0f}"
        files, step = (f"{size / 1e6:,.0f}" for size in (model.file_bytes, model.step_bytes))
        sizes.add_row(model.name, model.form, model.dtype, files, resident, step)
    return Group(speeds, sizes)


def evaluated(evaluation: Evaluation) -> RenderableType:
    """Perplexities and accuracies of one model."""
    tables: list[RenderableType] = []
    model = pinned(evaluation.model, evaluation.revision)
    if evaluation.details:
        table = Whole(title=model)
        table.add_column("text")
        for column in ("window", "windows", "perplexity", "bits per byte"):
            table.add_column(column, justify="right")
        for window, details in {evaluation.window: evaluation.details, **evaluation.other_windows}.items():
            for text, result in details.items():
                bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
                table.add_row(text, f"{window:,}", f"{result.windows:,}", f"{result.perplexity:,.3f}", bits)
            if mean := mean_of_domains({text: result.perplexity for text, result in details.items()}):
                table.add_row("mean of domains", f"{window:,}", "", f"{mean:,.3f}", "")
        tables.append(table)
    if evaluation.zero_shot is not None:
        tables.append(_answered(model, evaluation.zero_shot))
    return Group(*tables)


def demonstrated(result: Demo) -> RenderableType:
    """The methods of a demo side by side, and where its checkpoints are."""
    places = [f"Pruned by {method}: {folder}" for method, folder in result.checkpoints.items()]
    return Group(_compared(result.comparison), Text("\n".join([*places, f"Report: {result.page}"])))


def compared(result: Comparison, folder: Path) -> RenderableType:
    """Recipes side by side, and where their table and plot are."""
    files = ", ".join(str(folder / f"{NAME}{ending}") for ending in (".md", ".svg"))
    return Group(_compared(result), Text(f"Table and plot: {files}"))


def _compared(result: Comparison) -> RenderableType:
    table = Whole(title=result.model, caption=f"{result.calibration}; perplexity in windows of {result.window} tokens")
    head, *cells = listed([result.dense, *result.rows], result.earlier)
    for column in head:
        table.add_column(column, justify="left" if column in (head[0], MADE_BY) else "right")
    for line in cells:
        table.add_row(*line)
    pairs = listed_pairs(result.rows)
    if not pairs:
        return table
    paired = Whole(caption=PAIRED)
    for column in pairs[0]:
        paired.add_column(column, justify="left" if column == pairs[0][0] else "right")
    for line in pairs[1:]:
        paired.add_row(*line)
    return Group(table, paired)


def _answered(model: str, result: ZeroShot) -> RenderableType:
    """Accuracies with their standard errors, in per cent."""
    table = Whole(title=model, caption=f"zero-shot, lm_eval {result.lm_eval}, questions {result.source}")
    table.add_column("task")
    for column in ("questions", "acc %", "acc_norm %"):
        table.add_column(column, justify="right")
    for task, accuracy in result.tasks.items():
        shares = [(accuracy.acc, accuracy.acc_stderr), (accuracy.acc_norm, accuracy.acc_norm_stderr)]
        table.add_row(task, f"{accuracy.questions:,}", *(_share(*share) for share in shares))
    table.add_row("mean", "", f"{100 * result.mean:.2f}", "")
    return table


def _share(share: float | None, error: float | None) -> str:
    if share is None:
        return ""
    return f"{100 * share:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def contents(result: Contents) -> RenderableType:
    """Sparsity by block (rows) and linear (columns), and bytes."""
    model = pinned(result.model, result.revision)
    table = Whole(title=f"{model}: sparsity of the prunable weights in %", box=SIMPLE)
    table.add_column("block")
    linears_of = {
        block.name: [linear for linear in result.linears if linear.name.startswith(f"{block.name}.")]
        for block in result.blocks
    }
    short = [linear.name.rpartition(".")[2].removesuffix("_proj") for linear in linears_of[result.blocks[0].name]]
    for name in [*short, "all", "MB"]:
        table.add_column(name, justify="right")
    for block in result.blocks:
        linears = linears_of[block.name]
        cells = [f"{100 * share:.2f}" for share in [*(linear.sparsity for linear in linears), block.sparsity]]
        table.add_row(block.name.rpartition(".")[2], *cells, f"{block.bytes / 1e6:,.1f}")
    shares = ", ".join(f"{name} {8 * size / result.weights:.3f}" for name, size in result.parts.items())
    total = (
        f"{result.zeros:,} of {result.weights:,} weights are zero ({result.sparsity:.4%}); "
        f"{result.bytes / 1e6:,.1f} MB of prunable weights in {result.file_bytes / 1e6:,.1f} MB of files\n"
        f"{result.bits_per_weight:.3f} bits a weight: {shares}"
    )
    return Group(table, Text(total))


def simulated(simulation: Simulation) -> RenderableType:
    """Like the paper's Table 4, once for each figure: mean cycles of each kind of linear, dense and in checkpoints."""
    model = pinned(simulation.model, simulation.revision)
    table = Whole(title=f"{model}: cycles on a simulated accelerator, mean over blocks", box=SIMPLE)
    table.add_column("")
    shown = [*simulation.baselines, simulation]
    labels = [Path(one.model).name for one in shown]
    if len(set(labels)) < len(labels):
        labels = [pinned(one.model, one.revision) for one in shown]
    columns = [*simulation.kinds, simulation.block]
    for name in shortened([kind.name for kind in columns]):
        table.add_column(name if "." in name else name.removesuffix("_proj"), justify="right")
    for figure in simulation.block.each():
        table.add_row(f"[bold]{described(figure)}")
        table.add_row("  dense", *(_cycles(column.dense.each()[figure]) for column in columns))
        for label, one in zip(labels, shown, strict=True):
            own = {column.name: column.each()[figure] for column in [*one.kinds, one.block]}
            table.add_row(f"  {label}", *(_cycles(own[column.name]) for column in columns))
        ratios = [column.speedup[figure] for column in columns]
        table.add_row("  speed-up", *(f"{ratio:.2f}×" if ratio else "" for ratio in ratios), end_section=True)
    table.add_row("[bold]sparsity", *(f"{column.sparsity:.2%}" for column in columns))
    return table


def _cycles(number: float) -> str:
    """In six characters or less."""
    if number < 1e3:
        return f"{number:.1f}"
    return f"{number:,.0f}" if number < 1e5 else f"{number / 1e3:.4g}k" if number < 1e6 else f"{number / 1e6:.4g}M"
