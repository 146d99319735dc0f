"""The stage before the blocks: whole experts go, by what they add to the hidden states of the dense model."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from besa.data.calibration import Calibration
from besa.methods.dropping.dropper import Scorer, highest
from besa.methods.recipe import Recipe
from besa.models.blocks import Block, embedded
from besa.models.check import Check
from besa.models.mixtures import Fewer, Mixtures, fewer, find_mixtures
from besa.models.streaming import Decoder
from besa.observing.contributions import contributions
from besa.progress import Progress
from besa.pruning.paths import Resources
from besa.record import MixtureRecord
from besa.storage.journal import Journal
from besa.system import ranks
from besa.system.ranks import Share


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


def drop_experts(
    decoder: Decoder,
    shapes: Fewer | None,
    recipe: Recipe,
    calibration: Calibration,
    resources: Resources,
    journal: Journal | None,
    progress: Progress,
) -> Dropped:
    """Drop the experts of a recipe. The journal keeps which.

    Args:
        decoder: dense.
        shapes: from `smaller`.
        recipe: the method.
        calibration: token ids (N, T).
        resources: how to compute.
        journal: only rank 0 has one.
        progress: is called with (blocks done, blocks, state) after every block.

    Raises:
        BesaError: the blocks cannot be run one by one, or besa cannot see the gates of experts.
    """
    scoring = recipe.experts.scoring
    if scoring is None or shapes is None:
        return Dropped(decoder)
    known = ranks.from_first([each.model_dump() for each in journal.mixtures or []] if journal is not None else [])
    records = [MixtureRecord.model_validate(each) for each in known]
    if not records:
        records = _choose(decoder, shapes, scoring, calibration, resources, progress)
        if journal is not None:
            journal.keep_mixtures(records)
    kept = {each.name: [at for at in range(each.experts) if at not in each.gone] for each in records}
    return Dropped(*decoder.with_experts(shapes, kept), records)


def _choose(
    decoder: Decoder, shapes: Fewer, scoring: Scorer, calibration: Calibration, resources: Resources, progress: Progress
) -> list[MixtureRecord]:
    """Score the experts of every mixture in one pass through the dense model."""
    mixtures: Mixtures = shapes.mixtures
    share = Share.of(calibration.samples, resources.batch)
    check = Check(decoder, calibration.tokens_NT, resources.device)
    with decoder.embeddings(resources.device):
        x_NTC = embedded(decoder.model, decoder.blocks, calibration.tokens_NT, resources.batch, resources.room, share)
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
        progress(block.index + 1, len(decoder.blocks), "experts scored")
    return records
