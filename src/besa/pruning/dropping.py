"""The stage before the blocks: drop whole experts, scored by what they do in the dense model."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from besa.errors import BesaError
from besa.methods.dropping.dropper import Scorer, highest
from besa.methods.recipe import Recipe
from besa.models.blocks import Block
from besa.models.check import Check
from besa.models.ends import embedded
from besa.models.mixtures import Fewer, Mixtures, fewer, find_mixtures
from besa.models.streaming import Decoder
from besa.observing.contributions import contributions
from besa.pruning.run import Run
from besa.record import MixtureRecord
from besa.system import ranks


@dataclass(frozen=True)
class Dropped:
    """A decoder that has lost experts.

    Attributes:
        decoder: with the experts that stay, counted from 0 again.
        dense: with all experts; None if none went.
        mixtures: which went, and why.
    """

    decoder: Decoder
    dense: Decoder | None = None
    mixtures: list[MixtureRecord] = field(default_factory=list)


def smaller(model: PreTrainedModel, blocks: list[Block], recipe: Recipe) -> Fewer | None:
    """The shapes of a decoder without the experts that the recipe drops; None if it drops none.

    Args:
        model: its weights may be on the meta device.
        blocks: of the model.
        recipe: the method.

    Raises:
        BesaError: it has no experts, too few, or a configuration that cannot describe fewer.
    """
    scoring = recipe.experts.scoring
    if scoring is None:
        return None
    mixtures = find_mixtures(model, blocks)
    return fewer(model, blocks, mixtures, scoring.kept(mixtures))


def drop_experts(run: Run, shapes: Fewer | None) -> Dropped:
    """Drop the experts that the recipe chooses. The journal keeps the choice.

    Args:
        run: its decoder is dense.
        shapes: from `smaller`.

    Raises:
        BesaError: the blocks cannot be run one by one, besa cannot see the gates of experts, or no token reaches those
            of a mixture.
    """
    scoring, journal = run.recipe.experts.scoring, run.journal
    if scoring is None or shapes is None:
        return Dropped(run.decoder)
    known = ranks.from_first([each.model_dump() for each in journal.mixtures or []] if journal is not None else [])
    records = [MixtureRecord.model_validate(each) for each in known]
    if not records:
        records = _choose(run, shapes, scoring)
        if journal is not None:
            journal.keep_mixtures(records)
    kept = {each.name: [at for at in range(each.experts) if at not in each.gone] for each in records}
    return Dropped(*run.decoder.with_experts(shapes, kept), records)


def _choose(run: Run, shapes: Fewer, scoring: Scorer) -> list[MixtureRecord]:
    """Score the experts of every mixture in one pass through the dense model."""
    mixtures: Mixtures = shapes.mixtures
    decoder, tokens_NT, resources = run.decoder, run.calibration.tokens_NT, run.resources
    check = Check(decoder, tokens_NT, resources.device)
    with decoder.embeddings(resources.device):
        x_NTC = embedded(decoder.model, decoder.blocks, tokens_NT, resources.batch, resources.room, run.share)
    records = []
    for block, following in zip(decoder.blocks, [*decoder.blocks[1:], None], strict=True):
        with decoder.opened(block, resources.device):
            check.see(block)
            if following is not None:
                decoder.prefetch(following, resources.device)
            of_block = [mixture for mixture in mixtures.each if mixture.block == block.index]
            with contributions(block, of_block) as found:
                block.run(x_NTC, resources.batch, into=x_NTC)
        for mixture in of_block:
            if not bool(found[mixture.name].tokens_E.any()):
                raise BesaError(
                    f"No calibration token reaches the experts of {mixture.name}, so nothing tells which may go: leave "
                    "out experts.method."
                )
            scores_E = scoring.score(found[mixture.name])
            stay = set(highest(scores_E, shapes.kept, mixtures.groups))
            records.append(
                MixtureRecord(
                    name=mixture.name,
                    experts=mixture.experts,
                    gone=[at for at in range(mixture.experts) if at not in stay],
                    scores=[float(score) for score in scores_E.tolist()],
                    tokens=found[mixture.name].tokens_E.tolist(),
                )
            )
        run.progress(block.index + 1, len(decoder.blocks), "experts scored")
    return records
