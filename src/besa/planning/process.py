"""The peak memory of a process: while it prunes, while the whole model learns, and while it writes its own text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from besa.counting import widening
from besa.methods.fisher import LOGITS
from besa.models.units import units
from besa.observing.prediction_loss import tokens_at_once
from besa.planning.distinct import Distinct
from besa.planning.outline import Outline
from besa.planning.peak import learning_bytes, stored_bytes, unit_bytes
from besa.planning.states import States
from besa.planning.whole import whole_bytes
from besa.runtime.own_text import sizes_of
from besa.system import memory
from besa.system.devices import shares_memory

TEXT = 64 << 20  # bytes of the tokenizer and the calibration text while they are read
TOKENIZED = 180  # bytes for each character of a document while it is tokenised
PREDICTED = 20  # bytes for each token of the vocabulary where the loss is measured: logits, logarithms and gradients


@dataclass(frozen=True)
class Peaks:
    """Peak bytes of a run.

    Attributes:
        memory: of the process with the most.
        memory_of_all: of all processes on this machine together.
        gpu: on the GPU of a process; None for a device that computes in the machine's memory.
        distilling: the part of them for distilling the whole model, without hidden states; 0 if it is not distilled.
    """

    memory: int
    memory_of_all: int
    gpu: int | None
    distilling: int


def peaks(run: Outline, states: States, distinct: Sequence[Distinct]) -> Peaks:
    """The peaks of a run.

    Args:
        run: that is planned.
        states: its hidden states.
        distinct: its units.
    """
    distilling = _distilling(run, distinct)
    on_device = states.places["device"] + max(_outside(run), _pruning(run, distinct), distilling)
    needed = memory.current_bytes() + TEXT + states.places["host"]
    if run.device.type == "cpu" and run.model.dtype in widening.slow():
        needed += widening.BYTES
    if shares_memory(run.device):
        needed, gpu = needed + on_device, None
    else:
        needed, gpu = needed + 2 * _largest(run), on_device
    tokenizing = memory.current_bytes() + TEXT + TOKENIZED * run.document
    if run.file is not None:
        needed, tokenizing = needed + run.weight_bytes, tokenizing + run.weight_bytes
        needed = max(needed, _loading(run, run.file))
    needed = max(needed, tokenizing)
    of_all = run.ranks * needed
    if run.own:  # rank 0 writes before the others have work
        writing, writing_on_gpu = _writing(run)
        needed, of_all = max(needed, writing), max(of_all, writing)
        gpu = None if gpu is None else max(gpu, writing_on_gpu)
    return Peaks(needed, of_all, gpu, distilling)


def _loading(run: Outline, file: int) -> int:
    """Bytes while a .gguf file is read: it, all weights, and twice the largest in float32, as it is dequantised."""
    largest: int = max(parameter.numel() for parameter in run.model.parameters())
    return memory.current_bytes() + file + run.weight_bytes + 8 * largest


def _pruning(run: Outline, distinct: Sequence[Distinct]) -> int:
    """Bytes while a unit is pruned."""
    return _with_all_experts(run) + max(
        unit_bytes(run.model, each.unit, each.inputs, run.recipe, run.batch, run.seqlen) for each in distinct
    )


def _distilling(run: Outline, distinct: Sequence[Distinct]) -> int:
    """Bytes while the whole model learns; 0 if it does not."""
    whole = whole_bytes(run.model, run.blocks, run.recipe, run.seqlen)
    kept = max(sum(budget.weights - budget.zeros for budget in of_unit) for of_unit in run.budgets_of_units)
    return whole + max(learning_bytes(run.model, each.unit, kept, run.seqlen) for each in distinct) if whole else 0


def _outside(run: Outline) -> int:
    """Bytes while embeddings and head compute."""
    inside = {id(parameter) for block in run.blocks for parameter in block.module.parameters()}
    stored: int = sum(parameter.nbytes for parameter in run.model.parameters() if id(parameter) not in inside)
    tokens = min(run.seqlen, tokens_at_once(run.vocabulary, LOGITS)) if run.recipe.losses_every(run.samples) else 0
    return stored + PREDICTED * tokens * run.vocabulary


def _largest(run: Outline) -> int:
    """Bytes of the largest unit, as it is read."""
    return _with_all_experts(run) + max(map(stored_bytes, run.units))


def _with_all_experts(run: Outline) -> int:
    """Bytes of a unit with all its experts, which the dense path needs; 0 if none are dropped."""
    if run.fewer is None:
        return 0
    return max(map(stored_bytes, units(run.fewer.whole, run.recipe.granularity)))


def _writing(run: Outline) -> tuple[int, int]:
    """Bytes while the model writes its own text: those of the process, and those on its GPU if it has one."""
    weights, cache = sizes_of(run.model, run.seqlen, run.device)
    in_memory = weights + (cache if shares_memory(run.device) else 0)
    return memory.current_bytes() + TEXT + in_memory, weights + cache
