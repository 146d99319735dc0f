"""What comes before the first block: what the journal has, checks, measurements, and the budgets of all blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from besa.counting.budget import Budget
from besa.methods.targets.budgets import budgets
from besa.models.check import Check
from besa.models.units import Unit, units
from besa.pruning.measuring import Measured, measure
from besa.pruning.present import check_each, check_together, zeros_present
from besa.pruning.run import Run
from besa.record import BlockRecord
from besa.storage.journal import Journal
from besa.system import ranks


@dataclass(frozen=True)
class Prepared:
    """A run before its first block is pruned.

    Attributes:
        units: of the decoder, in the order in which they run.
        done: records by index of the blocks that need no pruning, because the journal has all blocks of their unit.
        budgets: of each unit.
        gradients: as of `Measured`.
        check: sees every block while it is dense; None if all are done.
    """

    units: list[Unit]
    done: Mapping[int, BlockRecord]
    budgets: list[list[Budget]]
    gradients: Mapping[str, Tensor]
    check: Check | None

    @property
    def last_open(self) -> int:
        """Place of the last unit that is to be pruned; -1 if all are done."""
        return max((place for place, unit in enumerate(self.units) if unit.index not in self.done), default=-1)


def prepare(run: Run) -> Prepared:
    """Check the model, measure what the recipe needs, and give each unit its budgets; nothing is pruned yet.

    If the journal has every block, none is looked at again.

    Args:
        run: its decoder is dense; the journal gets what is measured.

    Raises:
        BesaError: the blocks cannot be run one by one, weights are damaged, a budget has fewer zeros than there are
            already, or as of `measure`.
    """
    decoder, recipe = run.decoder, run.recipe
    in_order = units(decoder.blocks, recipe.granularity)
    done = _done(run.journal, in_order)
    to_prune = any(unit.index not in done for unit in in_order)
    check = Check(decoder, run.calibration.tokens_NT, run.resources.device) if to_prune else None
    present = zeros_present(run) if to_prune else {}
    check_together(budgets(decoder.blocks, recipe), run, present)
    measured = measure(run) if to_prune else Measured()
    plan = budgets(decoder.blocks, recipe, measured.targets, present)
    check_each(plan, run, present)
    return Prepared(units=in_order, done=done, budgets=plan, gradients=measured.gradients, check=check)


def _done(journal: Journal | None, in_order: Sequence[Unit]) -> dict[int, BlockRecord]:
    """Records by index of the blocks that need no pruning: the journal of rank 0 holds all blocks of their unit."""
    done: list[BlockRecord] = []
    for unit in in_order if journal is not None else ():
        assert journal is not None
        kept = [record for block in unit.blocks if (record := journal.record(block.index)) is not None]
        done += kept if len(kept) == len(unit.blocks) else []
    known = ranks.from_first([record.model_dump(mode="json") for record in done])
    return {record.index: record for record in map(BlockRecord.model_validate, known)}
