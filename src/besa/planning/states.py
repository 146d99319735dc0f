"""The hidden states that a rank keeps between blocks, and the places that have room for them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import get_args

from besa.errors import BesaError
from besa.models.activations import Place, Room
from besa.planning.outline import Outline
from besa.planning.passes import most, shares_of, states_measured
from besa.pruning.paths import dense_share
from besa.system import memory
from besa.system.ranks import together

PLACES: tuple[Place, ...] = get_args(Place)


@dataclass(frozen=True)
class States:
    """The hidden states of a rank.

    Attributes:
        size: bytes of all of them.
        places: how many bytes are on the ``device``, in memory of the ``host``, and in a ``file``.
    """

    size: int
    places: dict[Place, int]


def kept_states(run: Outline) -> States:
    """The hidden states of the rank with the most.

    Raises:
        BesaError: one batch needs more than the memory of this machine.
    """
    # What is measured on the dense model is freed before the others are allocated. Distilling has inputs and targets.
    in_turn = [_measured(run), [*_of_paths(run), _to_distil_on(run)], 2 * [_to_distil_on(run)]]
    with together(0, run.ranks):  # they share the host's memory
        placed = [_placed(sizes, Room(run.device, run.activation_budget)) for sizes in in_turn]
    if run.batch * run.seqlen * run.channels * run.item > memory.total_bytes():
        raise BesaError(
            f"A batch of {run.batch:,} × {run.seqlen:,} tokens needs more memory than this machine has: lower --batch "
            "or --seqlen."
        )
    places = {place: max(each[place] for each in placed) for place in PLACES}
    return States(max(map(sum, in_turn)), places)


def _of_paths(run: Outline) -> list[int]:
    """Bytes of the hidden states of the pruned path, of the dense path, and of the teachers that have their own."""
    every, tokens = dense_share(run.recipe, run.seqlen)
    pruned = run.sequences * run.seqlen * run.channels * run.item
    dense = most(run.shares, every) * tokens * run.channels * run.item
    teacher = pruned if run.recipe.teacher == "pruned" else dense
    of_attention = [teacher] if run.recipe.granularity == "attn-mlp" else []
    return [pruned, dense, *of_attention, *([pruned] if run.recipe.teacher == "pruned" else [])]


def _to_distil_on(run: Outline) -> int:
    """Bytes of the hidden states of the sequences to distil on."""
    sequences = most(shares_of(run.recipe.distill.training_sequences(run.samples), run.batch, run.ranks))
    return sequences * run.seqlen * run.channels * run.item


def _measured(run: Outline) -> list[int]:
    """Bytes of the hidden states that are kept while the dense model is measured, a sequence each."""
    sequences = states_measured(run.recipe, run.samples, len(run.blocks), run.batch, run.ranks)
    return [run.seqlen * run.channels * run.item] * sequences


def _placed(sizes: list[int], room: Room) -> Counter[Place]:
    """Bytes of hidden states of these sizes in each place, if they are allocated in this order."""
    placed: Counter[Place] = Counter()
    for size in sizes:
        place, taken = room.take(size)
        placed[place] += taken or size
    return placed
