"""Search: of a few ways to tell blocks apart, the one after which the model as a whole still predicts best.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, V vocabulary, O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import kl_div

from besa.counting.masks import hard_mask, rank
from besa.errors import BesaError
from besa.methods.importance import Wanda
from besa.methods.targets.bounded import Bounded, Survey
from besa.methods.targets.fisher import one_threshold
from besa.models.activations import HiddenStates
from besa.models.blocks import logits_of, send
from besa.models.streaming import Decoder
from besa.observing.input_statistics import InputStatistics


class Search(Bounded):
    """A few strengths of `LossSensitivity` are tried, and the one stays that moves the model's predictions least.

    For a trial the dense model loses the lowest |W|·‖x‖ of each row, every row of a block as many, and no weight moves.
    What its predictions are compared on are other sequences than those that say where the blocks are to go.
    """

    method: Literal["search"] = "search"
    every: int = Field(
        default=8, ge=2, description="one calibration sequence in so many is looked at, another is held out"
    )
    strengths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        default=(0.0, 0.35, 0.7, 1.0), min_length=2, description="parts of the way from uniform to the threshold"
    )
    needs_loss: ClassVar[bool] = True

    @property
    def passes(self) -> float:
        """As `LossSensitivity`, and one forward pass of the dense model and of each trial."""
        return (3 + 1 + self.trials) / self.every

    @property
    def trials(self) -> int:
        """One for each strength."""
        return len(self.strengths)

    def sequences_kept(self, samples: int, blocks: int) -> int:
        """As `LossSensitivity`; after that at one block, of the embeddings, the dense model and every trial."""
        return -(-samples // self.every) * max(blocks + 1, self.trials + 2)

    def measure(self, survey: Survey) -> list[float]:
        """The sparsity that each block wants; of strengths that do as well, the first counts.

        Raises:
            BesaError: no sequence is left to be held out.
        """
        held_out_NT = survey.calibration.tokens_NT[1 :: self.every]
        if not len(held_out_NT):
            raise BesaError("targets.method=search holds sequences out: take at least two --samples.")
        threshold = one_threshold(survey, self.tokens(survey))
        wanted = [threshold.part_way(strength) for strength in self.strengths]
        trials = [self.bounded(rates, survey.sizes, survey.sparsity) for rates in wanted]
        found = divergences(survey, threshold.statistics, trials, held_out_NT)
        return wanted[found.index(min(found))]


@torch.no_grad()
def divergences(
    survey: Survey, statistics: Mapping[str, InputStatistics], trials: Sequence[Sequence[float]], tokens_NT: Tensor
) -> list[float]:
    """How far each trial's predictions are from the dense model's: Kullback-Leibler divergence, nats per token.

    All trials go through a block while it is there, the dense model beside them.

    Args:
        survey: whose model is pruned; its weights are left alone.
        statistics: of the inputs of its matrices.
        trials: the sparsity of each block, in each trial.
        tokens_NT: what is predicted on.
    """
    first_NTC = survey.embedded(tokens_NT)
    dense_NTC, *pruned = [survey.room_like(first_NTC, len(trials) + 1) for _ in range(len(trials) + 1)]
    for path_NTC in (dense_NTC, *pruned):
        path_NTC[: len(first_NTC)] = first_NTC
    for block, names in zip(survey.decoder.blocks, survey.names, strict=True):
        with survey.decoder.opened(block, survey.device):
            block.run(dense_NTC, survey.batch, into=dense_NTC)
            own = {name: block.weight(name).detach() for name in names}
            ranks = {name: rank(Wanda().score(w_OI, statistics[name]), w_OI) for name, w_OI in own.items()}
            for rates, path_NTC in zip(trials, pruned, strict=True):
                weights = {name: _pruned(w_OI, ranks[name], rates[block.index]) for name, w_OI in own.items()}
                send(partial(block, weights=weights), block.name, path_NTC, survey.batch, survey.device, into=path_NTC)
    return _from_dense(survey.decoder, dense_NTC, pruned, tokens_NT)


def _pruned(w_OI: Tensor, ranks_OI: Tensor, rate: float) -> Tensor:
    """The weight without its lowest ranks, each row without as many; together to within half a weight."""
    rows, width = w_OI.shape
    upto = (rate * width * torch.arange(rows + 1, dtype=torch.float64)).round()
    return w_OI.where(hard_mask(ranks_OI, upto.diff().to(w_OI.device)), 0)


def _from_dense(
    decoder: Decoder, dense_NTC: HiddenStates, pruned: Sequence[HiddenStates], tokens_NT: Tensor
) -> list[float]:
    """The divergence that each of the outputs `pruned` of the last block comes to, a sequence at a time."""
    sums = [0.0] * len(pruned)
    with decoder.outside_blocks():
        for n in range(len(tokens_NT)):
            one = slice(n, n + 1)
            dense_TV = _predicted(decoder, tokens_NT[one], dense_NTC[one])
            for place, path_NTC in enumerate(pruned):
                found_TV = _predicted(decoder, tokens_NT[one], path_NTC[one])
                sums[place] += float(kl_div(found_TV, dense_TV, log_target=True, reduction="sum"))
    return [total / tokens_NT.numel() for total in sums]


def _predicted(decoder: Decoder, tokens_NT: Tensor, y_NTC: Tensor) -> Tensor:
    """Log-probabilities (T, V), float32, of what comes next in a sequence for which the last block puts out `y_NTC`."""
    logits_NTV = logits_of(decoder.model, decoder.blocks, tokens_NT, y_NTC.to(decoder.model.device))
    return logits_NTV[0].float().log_softmax(dim=-1)
