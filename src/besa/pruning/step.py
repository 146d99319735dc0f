"""Prune one unit of the model: lines 3 to 12 of Algorithm 1.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, O rows, I columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from besa.counting.budget import Budget
from besa.counting.masks import rank
from besa.errors import BesaError
from besa.methods.allocation import Allocated, BlockProblem, RankedLinear, first_tokens
from besa.methods.finetuning import Finetuned, FinetuningProblem
from besa.methods.recipe import Recipe
from besa.methods.reconstruction import NoReconstruction
from besa.methods.reconstruction.rounding import unrounded
from besa.models.activations import HiddenStates
from besa.models.prunable import everywhere
from besa.models.transfers import fetched
from besa.models.units import Part, Unit, parts
from besa.observing.input_statistics import InputStatistics, look
from besa.observing.losses import error_between
from besa.observing.probes import RowSensitivities
from besa.pruning import quantizing
from besa.pruning.coded import Coded
from besa.pruning.counted import linear_records
from besa.pruning.paths import ERROR_SHARE, ERROR_TOKENS
from besa.pruning.run import Run
from besa.quantization import Quantized
from besa.record import BlockRecord
from besa.system import ranks
from besa.system.stopwatch import Stopwatch


@dataclass(frozen=True)
class Step:
    """A unit to prune, and its inputs on both paths.

    Attributes:
        run: gives method, seed and resources, and the sequences of both paths, which are those of this rank.
        unit: still dense.
        whole: the same unit with all its experts, of the dense path and the teacher; the unit itself if none went.
        budgets: of the unit.
        pruned_NTC: inputs on the pruned path; replaced by the outputs of the pruned unit.
        dense_NTC: inputs on the dense path, of the sequences and tokens that it has; replaced by the outputs.
        gradients: as in `BlockProblem`.
        watch: counts the seconds of each phase.
    """

    run: Run
    unit: Unit
    whole: Unit
    budgets: list[Budget]
    pruned_NTC: HiddenStates
    dense_NTC: HiddenStates
    gradients: Mapping[str, Tensor]
    watch: Stopwatch


def prune_unit(step: Step) -> tuple[list[BlockRecord], Coded]:
    """Prune a unit in place, and move both paths on to its outputs.

    Returns:
        A record of each block, and the quantised weights of the unit.

    Raises:
        BesaError: no token reaches a matrix that is to be pruned, the block already has more zeros than its budget
            allows, or its outputs are too large to be compared.
    """
    unit, recipe, watch = step.unit, step.run.recipe, step.watch
    in_turn = parts(unit, recipe.granularity)
    with watch("teacher"):
        part_targets = [_part_targets(step, part) for part in parts(step.whole, recipe.granularity)[:-1]]
    outputs_NTC = step.run.resources.room.empty_like(step.pruned_NTC) if recipe.teacher == "pruned" else None
    statistics, dense_outputs = _observe(step, outputs_NTC)
    _check_seen(step, statistics)
    _check_gradients(step)
    unit_targets_NTC = step.dense_NTC if outputs_NTC is None else outputs_NTC
    linears: dict[str, RankedLinear] = {}
    losses: list[float] = []
    coded = Coded()
    for part, targets_NTC in zip(in_turn, [*part_targets, unit_targets_NTC], strict=True):
        part_linears, allocated = _prune(step, part, targets_NTC, statistics, coded)
        linears |= part_linears
        losses += allocated.losses
    with watch("finetune"):
        problem = FinetuningProblem(
            block=unit,
            names=list(linears),
            inputs_NTC=step.pruned_NTC,
            targets_NTC=step.dense_NTC,
            share=step.run.share,
            seed=step.run.seed + unit.index,
        )
        finetuned = recipe.finetune.tune(problem)
        for name, w_OI in finetuned.weights.items():
            unit.weight(name).detach().copy_(w_OI)
    errors = _propagate(step, dense_outputs)
    return _records(step, linears, losses, finetuned, errors), coded


def _observe(step: Step, outputs_NTC: HiddenStates | None) -> tuple[dict[str, InputStatistics], list[HiddenStates]]:
    """Move the dense path on (line 3), and run the pruned path through the dense unit.

    Args:
        step: its unit is still dense.
        outputs_NTC: receives the outputs on the pruned path; None if they are not needed.

    Returns:
        The statistics of the linears' inputs on the pruned path, and the outputs of each block on the dense path.
    """
    unit, recipe, batch, watch = step.unit, step.run.recipe, step.run.resources.batch, step.watch
    dense_outputs = []
    with watch("teacher"):
        for block in step.whole.blocks:
            block.run(step.dense_NTC, batch, into=step.dense_NTC)
            dense_outputs.append(step.dense_NTC if block is step.whole.blocks[-1] else _error_sample(step))
    with watch("statistics"):
        if outputs_NTC is not None:
            step.whole.run(step.pruned_NTC, batch, into=outputs_NTC)
        every = recipe.statistics_every(routed=any(prunable.routed for prunable in unit.prunables.values()))
        return look(unit, step.pruned_NTC, batch, recipe.needs_gram, step.run.share, every), dense_outputs


def _check_seen(step: Step, statistics: Mapping[str, InputStatistics]) -> None:
    """Check that every matrix to be pruned has inputs. Only some experts may have none: the router did not choose them.

    Raises:
        BesaError: a matrix to be pruned appeared in no product, and has no router before it that sent tokens to others.
    """
    pruned = {name for budget in step.budgets if budget.zeros for name in budget.names}
    unseen = []
    for block in step.unit.blocks:
        sent = {everywhere(name) for name, one in block.prunables.items() if one.routed and statistics[name].tokens}
        names = [name for name in block.prunables if name in pruned and not statistics[name].tokens]
        unseen += [name for name in names if everywhere(name) not in sent]
    if unseen:
        more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
        patterns = " ".join(f"--skip '{pattern}'" for pattern in dict.fromkeys(map(everywhere, unseen)))
        raise BesaError(
            f"No token reaches {unseen[0]}{more}, or the block multiplies in a way that besa cannot see: take "
            f"{patterns} to leave such matrices dense."
        )


def _check_gradients(step: Step) -> None:
    """Check, where a recipe learns, that the model's own code does not keep experts out of the backward pass.

    Raises:
        BesaError: it does.
    """
    routed = any(prunable.routed for prunable in step.unit.prunables.values())
    if step.run.recipe.learns_through_blocks and routed and len(step.pruned_NTC):
        x_NTC = fetched(step.pruned_NTC[:1], step.unit.device)
        RowSensitivities(step.unit).send_back(x_NTC, torch.zeros_like(x_NTC))


def _prune(
    step: Step, part: Part, targets_NTC: HiddenStates, statistics: Mapping[str, InputStatistics], coded: Coded
) -> tuple[dict[str, RankedLinear], Allocated]:
    """Prune a part of the unit in place, and add to the quantised weights; return its dense linears and its zeros."""
    unit, recipe, watch = step.unit, step.run.recipe, step.watch
    budgets = [budget for budget in step.budgets if budget.names[0] in part.names]
    if not budgets:  # all its linears are skipped
        return {}, Allocated({})
    with watch("rank"):
        linears = {name: _ranked(unit, name, recipe, statistics[name]) for budget in budgets for name in budget.names}
    block = unit.silencing(part.silent)
    problem = BlockProblem(
        block=block,
        linears=linears,
        inputs_NTC=step.pruned_NTC,
        targets_NTC=targets_NTC,
        budgets=budgets,
        seed=step.run.seed + unit.index,
        share=step.run.share,
        gradients=step.gradients,
    )
    with watch("allocate"):
        allocated, quantized = _allocate(problem, recipe, statistics)
        coded.quantized |= quantized
    with watch("rebuild"), torch.no_grad():
        for name, linear in linears.items():  # line 12
            unit.weight(name).copy_(_rebuilt(name, linear, recipe, allocated, statistics[name], coded))
        for name in allocated.biases:
            unit.parameter(name).zero_()
    return linears, allocated


def _allocate(
    problem: BlockProblem, recipe: Recipe, statistics: Mapping[str, InputStatistics]
) -> tuple[Allocated, dict[str, Quantized]]:
    """Decide the zeros of a part (lines 5 to 10), and the codes of weights that do not move."""
    coding, moved = recipe.quantization.coding, recipe.quantization.moved
    if moved is not None:
        return quantizing.allocate_before_moving(problem, recipe, moved), {}
    if coding is not None:
        return quantizing.allocate_and_quantize(problem, recipe, coding, statistics)
    return recipe.allocation.allocate(problem), {}


def _rebuilt(
    name: str, linear: RankedLinear, recipe: Recipe, allocated: Allocated, statistics: InputStatistics, coded: Coded
) -> Tensor:
    """The pruned weight (O, I) of a linear, rounded where the recipe rounds it; adds to the quantised weights."""
    if name in coded.quantized:
        return coded.quantized[name].weight()
    ranks_OI, counts_O = allocated.ranks.get(name, linear.ranks_OI), allocated.counts[name]
    method = recipe.reconstruction if linear.reached else NoReconstruction()  # on no tokens there is nothing to solve
    w_OI = method.rebuild(linear.w_OI, ranks_OI, counts_O, statistics, recipe.group)
    moved = recipe.quantization.moved
    if moved is None:
        return w_OI
    groups = moved.groups(name, w_OI.shape[1])
    coded.unrounded[name] = unrounded(w_OI, linear.w_OI, statistics, moved, groups)
    coded.quantized[name] = coded.unrounded[name].quantized()
    return coded.quantized[name].weight()


def _part_targets(step: Step, part: Part) -> HiddenStates:
    """The outputs of the teacher with the silent matrices of the part set to zero."""
    inputs_NTC = step.pruned_NTC if step.run.recipe.teacher == "pruned" else step.dense_NTC
    targets_NTC = step.run.resources.room.empty_like(inputs_NTC)
    step.whole.silencing(part.silent).run(inputs_NTC, step.run.resources.batch, into=targets_NTC)
    return targets_NTC


def _error_sample(step: Step) -> HiddenStates:
    """The hidden states of the dense path on which the error is measured."""
    places = step.run.share.own(step.run.share.every(ERROR_SHARE))
    if len(step.dense_NTC) < len(step.pruned_NTC):  # it has no others
        places = list(range(len(places)))
    tokens = first_tokens(step.pruned_NTC.shape[1], ERROR_TOKENS)
    return torch.cat([step.dense_NTC[:0], *(step.dense_NTC[at : at + 1] for at in places)])[:, :tokens]


def _ranked(unit: Unit, name: str, recipe: Recipe, statistics: InputStatistics) -> RankedLinear:
    """A weight of the unit with its importance (eq. 2) and its pruning order (line 4)."""
    w_OI = unit.weight(name).detach()
    importance_OI = recipe.importance.score(w_OI, statistics)
    ranks_OI = ranks.by_rows(lambda rows: rank(importance_OI[rows], w_OI[rows], recipe.group), len(w_OI))
    return RankedLinear(w_OI, importance_OI, ranks_OI, statistics.reached, recipe.importance.power)


def _propagate(step: Step, dense_outputs: list[HiddenStates]) -> list[Tensor]:
    """Move the pruned path on to the outputs of the unit, block by block (line 11).

    Args:
        step: its unit is pruned.
        dense_outputs: outputs of each block on the dense path.

    Returns:
        The error (scalar) of each block's outputs against those of the dense path.
    """
    unit, watch, errors = step.unit, step.watch, []
    for block, dense_NTC in zip(unit.blocks, dense_outputs, strict=True):
        with watch("propagate"):
            block.run(step.pruned_NTC, step.run.resources.batch, into=step.pruned_NTC)
        with watch("measure"):
            tokens = first_tokens(step.pruned_NTC.shape[1], ERROR_TOKENS)
            errors.append(error_between(step.pruned_NTC, dense_NTC, step.run.share, ERROR_SHARE, tokens, unit.device))
    return errors


def _records(
    step: Step, linears: dict[str, RankedLinear], losses: list[float], finetuned: Finetuned, errors: list[Tensor]
) -> list[BlockRecord]:
    """The record of each block, counted in its pruned weights.

    Args:
        step: its unit is pruned.
        linears: the pruned linears as they were when dense, by full name.
        losses: of the learning steps.
        finetuned: result of the fine-tuning.
        errors: as of `_propagate`.

    Raises:
        BesaError: as of `_check_errors`.
    """
    watch, unit = step.watch, step.unit
    with watch("measure"):
        counted = linear_records({name: unit.weight(name).detach() for name in linears}, linears)
        measured: list[float] = torch.stack(errors).tolist()
    _check_errors(unit, measured)
    share = len(unit.blocks)
    records = []
    for block, error in zip(unit.blocks, measured, strict=True):
        block_linears = [record for name, record in counted.items() if name in block.prunables]
        weights = sum(linears[linear.name].w_OI.numel() for linear in block_linears)
        zeros = sum(linear.zeros for linear in block_linears)
        records.append(
            BlockRecord(
                index=block.index,
                name=block.name,
                weights=weights,
                zeros=zeros,
                sparsity=zeros / weights if weights else 0.0,
                reconstruction_error=error,
                losses=losses if block is unit.blocks[-1] else [],
                finetuning=finetuned.losses if block is unit.blocks[-1] else [],
                seconds=sum(watch.seconds.values()) / share,
                phases={phase: seconds / share for phase, seconds in watch.seconds.items()},
                sent={phase: sent // share for phase, sent in watch.sent.items()},
                structures=dict(step.run.recipe.allocation.kept(block, step.budgets[0])) if step.budgets else {},
                linears=block_linears,
            )
        )
    return records


def _check_errors(unit: Unit, errors: list[float]) -> None:
    """Refuse errors that are NaN or infinite: later blocks would be pruned by what such outputs leave of their inputs.

    Raises:
        BesaError: outputs of a block are too large to be squared in float32.
    """
    for block, error in zip(unit.blocks, errors, strict=True):
        if not math.isfinite(error):
            raise BesaError(
                f"The outputs of {block.name} are too large to be compared (their error is {error}): check the weights "
                "of the model."
            )
