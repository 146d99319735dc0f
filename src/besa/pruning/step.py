"""What is done to one unit of the model: lines 3 to 12 of Algorithm 1.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from besa.counting.budget import Budget
from besa.counting.masks import rank
from besa.errors import BesaError
from besa.methods.allocation import Allocated, BlockProblem, RankedLinear, first_tokens
from besa.methods.finetuning import Finetuned
from besa.methods.recipe import Recipe
from besa.models.activations import HiddenStates, allocate
from besa.models.prunable import everywhere
from besa.models.units import Part, Unit, parts
from besa.observing.input_statistics import InputStatistics, collect, look
from besa.observing.losses import error_between
from besa.pruning import quantizing
from besa.pruning.paths import ERROR_SHARE, ERROR_TOKENS, Resources
from besa.quantization import Quantized
from besa.record import BlockRecord, linear_record
from besa.system.stopwatch import Stopwatch


@dataclass(frozen=True)
class Step:
    """What is pruned at once, and what reaches it on both paths."""

    unit: Unit
    budgets: list[Budget]
    recipe: Recipe
    pruned_NTC: HiddenStates
    dense_NTC: HiddenStates
    seed: int
    resources: Resources
    watch: Stopwatch

    def room_like(self, x_NTC: HiddenStates) -> HiddenStates:
        """Room for as many hidden states again."""
        first_NTC = x_NTC[:1]
        shape = (len(x_NTC), first_NTC.shape[1], first_NTC.shape[2])
        return allocate(shape, first_NTC.dtype, self.resources.activation_budget // 2, self.resources.folder)


def prune_unit(step: Step) -> tuple[list[BlockRecord], dict[str, Quantized]]:
    """Decide what goes, take it out of the unit, and move both paths on to its outputs.

    Returns:
        What was done to each block, and the unit's quantised weights by name.
    """
    unit, recipe, watch = step.unit, step.recipe, step.watch
    halves = parts(unit, recipe.granularity)
    with watch("teacher"):
        halfway = [_halfway(step, part) for part in halves[:-1]]
    own_NTC = step.room_like(step.pruned_NTC) if recipe.teacher == "pruned" else None
    statistics, between = _watched(step, own_NTC)
    _refuse_unseen(step, statistics)
    linears: dict[str, RankedLinear] = {}
    losses: list[float] = []
    quantized: dict[str, Quantized] = {}
    for part, targets_NTC in zip(halves, [*halfway, step.dense_NTC if own_NTC is None else own_NTC], strict=True):
        ranked, allocated, codes = _prune(step, part, targets_NTC, statistics)
        linears |= ranked
        losses += allocated.losses
        quantized |= codes
    with watch("finetune"):
        finetuned = recipe.finetune.tune(unit, list(linears), step.pruned_NTC, step.dense_NTC, step.seed + unit.index)
        for name, w_OI in finetuned.weights.items():
            unit.weight(name).detach().copy_(w_OI)
    return _records(step, linears, losses, finetuned, between), quantized


def _watched(step: Step, own_NTC: HiddenStates | None) -> tuple[dict[str, InputStatistics], list[HiddenStates]]:
    """Move the dense path on (line 3), and send the pruned path through the unit as it is.

    Args:
        step: whose unit is still dense.
        own_NTC: where the outputs of the pruned path go; None where nobody wants them.

    Returns:
        The statistics of the linears' inputs on the pruned path, and what the dense path has after each block.
    """
    unit, recipe, batch, watch = step.unit, step.recipe, step.resources.batch, step.watch
    between = []
    with watch("teacher"):
        for block in unit.blocks:
            block.run(step.dense_NTC, batch, into=step.dense_NTC)
            between.append(step.dense_NTC if block is unit.blocks[-1] else _sampled(step))
    if own_NTC is None:
        with watch("statistics"):
            return look(unit, step.pruned_NTC, batch, recipe.needs_gram), between
    with watch("statistics"), ExitStack() as stack:
        collected = [
            stack.enter_context(collect(block.module, block.prunables, recipe.needs_gram)) for block in unit.blocks
        ]
        unit.run(step.pruned_NTC, batch, into=own_NTC)
    return {name: found for own in collected for name, found in own.items()}, between


def _refuse_unseen(step: Step, statistics: Mapping[str, InputStatistics]) -> None:
    """Only experts are pruned where no token came: of any other matrix, besa does not know what it multiplies.

    Raises:
        BesaError: a matrix is to be pruned that was not seen in any product, and that no router stands before.
    """
    asked = [name for budget in step.budgets if budget.zeros for name in budget.names]
    unseen = [name for name in asked if not statistics[name].tokens and not step.unit.prunables[name].routed]
    if unseen:
        more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
        patterns = " ".join(f"--skip '{pattern}'" for pattern in dict.fromkeys(map(everywhere, unseen)))
        raise BesaError(
            f"No token reaches {unseen[0]}{more}, or the block multiplies in a way that besa cannot see: take "
            f"{patterns} to leave such matrices dense."
        )


def _prune(
    step: Step, part: Part, targets_NTC: HiddenStates, statistics: Mapping[str, InputStatistics]
) -> tuple[dict[str, RankedLinear], Allocated, dict[str, Quantized]]:
    """Prune a part of the unit in place; returns what it was, what was decided, and its quantised weights."""
    unit, recipe, watch = step.unit, step.recipe, step.watch
    own = [budget for budget in step.budgets if budget.names[0] in part.names]
    with watch("rank"):
        linears = {name: _ranked(unit, name, recipe, statistics[name]) for budget in own for name in budget.names}
    at = unit.silencing(part.silent)
    problem = BlockProblem(at, linears, step.pruned_NTC, targets_NTC, own, step.seed + unit.index)
    quantized: dict[str, Quantized] = {}
    with watch("allocate"):
        if recipe.quantization.coding is not None:
            allocated, quantized = quantizing.allocate(problem, recipe, recipe.quantization.coding, statistics)
        else:
            allocated = recipe.allocation.allocate(problem)  # lines 5 to 10
    with watch("rebuild"), torch.no_grad():
        for name, linear in linears.items():  # line 12
            if name in quantized:
                w_OI = quantized[name].weight()
            else:
                counts_O = allocated.counts[name].to(linear.w_OI.device)
                ranks_OI = allocated.ranks.get(name, linear.ranks_OI)
                w_OI = recipe.reconstruction.rebuild(linear.w_OI, ranks_OI, counts_O, statistics[name], recipe.group)
            unit.weight(name).copy_(w_OI)
    return linears, allocated, quantized


def _halfway(step: Step, part: Part) -> HiddenStates:
    """What the teacher puts out with the silent matrices of a part silent."""
    source_NTC = step.pruned_NTC if step.recipe.teacher == "pruned" else step.dense_NTC
    into_NTC = step.room_like(source_NTC)
    step.unit.silencing(part.silent).run(source_NTC, step.resources.batch, into=into_NTC)
    return into_NTC


def _sampled(step: Step) -> HiddenStates:
    """As much of the dense path's states as the error is measured on."""
    stride = ERROR_SHARE if len(step.dense_NTC) == len(step.pruned_NTC) else 1
    tokens = first_tokens(step.pruned_NTC[:1].shape[1], ERROR_TOKENS)
    return torch.cat([step.dense_NTC[at : at + 1][:, :tokens] for at in range(0, len(step.dense_NTC), stride)])


def _ranked(unit: Unit, name: str, recipe: Recipe, statistics: InputStatistics) -> RankedLinear:
    """A weight of the unit in the order in which the recipe prunes it (line 4, eq. 2)."""
    w_OI = unit.weight(name).detach()
    importance_OI = recipe.importance.score(w_OI, statistics)
    ranks_OI = rank(importance_OI, w_OI, recipe.group)
    return RankedLinear(w_OI, importance_OI, ranks_OI, statistics.reached, recipe.importance.power)


def _records(
    step: Step,
    linears: dict[str, RankedLinear],
    losses: list[float],
    finetuned: Finetuned,
    between: list[HiddenStates],
) -> list[BlockRecord]:
    """Move the pruned path on (line 11) and say what was done, counted in the blocks' weights as they are now.

    Args:
        step: whose weights are pruned by now.
        linears: what was pruned, by full name.
        losses: of the learning steps.
        finetuned: how the kept weights moved.
        between: what the dense path has after each block.
    """
    watch, counted = step.watch, []
    for block, dense_NTC in zip(step.unit.blocks, between, strict=True):
        with watch("propagate"):
            block.run(step.pruned_NTC, step.resources.batch, into=step.pruned_NTC)  # line 11
        with watch("measure"):
            tokens = first_tokens(step.pruned_NTC[:1].shape[1], ERROR_TOKENS)
            error = error_between(step.pruned_NTC, dense_NTC, ERROR_SHARE, tokens)
            own = [
                linear_record(name, block.weight(name).detach(), linear.importance_OI, linear.reached)
                for name, linear in linears.items()
                if name in block.prunables
            ]
        counted.append((block, error, own))
    share = len(counted)
    records = []
    for block, error, own in counted:
        weights, zeros = sum(linears[part.name].w_OI.numel() for part in own), sum(part.zeros for part in own)
        records.append(
            BlockRecord(
                index=block.index,
                name=block.name,
                weights=weights,
                zeros=zeros,
                sparsity=zeros / weights if weights else 0.0,
                reconstruction_error=error,
                losses=losses if block is step.unit.blocks[-1] else [],
                finetuning=finetuned.losses if block is step.unit.blocks[-1] else [],
                seconds=sum(watch.seconds.values()) / share,
                phases={phase: seconds / share for phase, seconds in watch.seconds.items()},
                linears=own,
            )
        )
    return records
