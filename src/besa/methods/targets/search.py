"""Search: of several strengths, the one after which the model's predictions change least.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, V vocabulary, O rows, I columns, P pruned
paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import kl_div

from besa.counting.masks import hard_mask, rank
from besa.counting.precision import widest
from besa.errors import BesaError
from besa.methods.fisher import LOGITS, loss_gradients
from besa.methods.importance import Wanda
from besa.methods.survey import Survey
from besa.methods.targets.bounded import Bounded
from besa.models.activations import HiddenStates
from besa.models.blocks import send
from besa.models.ends import logits_of
from besa.models.sizes import vocabulary
from besa.models.transfers import fetched
from besa.observing.input_statistics import InputStatistics
from besa.observing.prediction_loss import tokens_at_once
from besa.system import ranks


class Search(Bounded):
    """Try several strengths of `LossSensitivity`, and take the one that changes the model's predictions least.

    For a trial, every row of a block loses the same number of weights, those of lowest |W|·‖x‖. Kept weights do not
    change. Predictions are compared on held-out sequences, not on those that the threshold is measured on.
    """

    method: Literal["search"] = "search"
    strengths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        default=(0.0, 0.35, 0.7, 1.0), min_length=2, description="strengths to try: 0 is uniform, 1 one threshold"
    )

    def every(self, samples: int) -> int:
        """At least two: others are held out."""
        return max(2, super().every(samples))

    def loss_every(self, samples: int) -> int:
        """One calibration sequence in this many is measured."""
        return self.every(samples)

    @property
    def forwards(self) -> int:
        """Forward passes: one of the dense model and one of each trial."""
        return 1 + self.trials

    @property
    def trials(self) -> int:
        """Trials: one for each strength."""
        return len(self.strengths)

    @property
    def paths(self) -> int:
        """Sets of hidden states at one block: of the embeddings, of the dense model and of every trial."""
        return self.trials + 2

    def measure(self, survey: Survey) -> list[float]:
        """A sparsity for each block; of equally good strengths, the first is chosen.

        Raises:
            BesaError: there is no sequence to hold out.
        """
        every = self.every(survey.calibration.samples)
        held_out_NT = survey.calibration.tokens_NT[1::every]
        if not len(held_out_NT):
            raise BesaError("targets.method=search holds sequences out: take at least two --samples.")
        measured = loss_gradients(survey, every)
        candidates = [measured.part_way(strength) for strength in self.strengths]
        trials = [self.bounded(rates, survey.sizes, survey.sparsity) for rates in candidates]
        distances = divergences(survey, measured.statistics, trials, held_out_NT)
        return candidates[distances.index(min(distances))]


@torch.no_grad()
def divergences(
    survey: Survey, statistics: Mapping[str, InputStatistics], trials: Sequence[Sequence[float]], tokens_NT: Tensor
) -> list[float]:
    """Kullback-Leibler divergence of each trial's predictions from those of the dense model, in nats per token.

    While a block is loaded, the dense model and all trials run through it.

    Args:
        survey: the dense model; its weights are not changed.
        statistics: of the inputs of its matrices, by full name.
        trials: sparsity of each block, for each trial.
        tokens_NT: sequences to predict on.
    """
    first_NTC = survey.embedded(tokens_NT)
    dense_NTC, *pruned = [survey.room.empty_like(first_NTC) for _ in range(len(trials) + 1)]
    for path_NTC in (dense_NTC, *pruned):
        for n in range(len(first_NTC)):  # one by one: states in a file do not fit in memory
            path_NTC[n : n + 1] = first_NTC[n : n + 1]
    for block, names in zip(survey.decoder.blocks, survey.names, strict=True):
        with survey.opened(block):
            block.run(dense_NTC, survey.batch, into=dense_NTC)
            dense = {name: block.weight(name).detach() for name in names}
            ranks = {name: rank(Wanda().score(w_OI, statistics[name]), w_OI) for name, w_OI in dense.items()}
            for rates, path_NTC in zip(trials, pruned, strict=True):
                weights = {name: _pruned(w_OI, ranks[name], rates[block.index]) for name, w_OI in dense.items()}
                send(partial(block, weights=weights), block.name, path_NTC, survey.batch, survey.device, into=path_NTC)
    return _from_dense(survey, dense_NTC, pruned, tokens_NT)


def _pruned(w_OI: Tensor, ranks_OI: Tensor, rate: float) -> Tensor:
    """The weight with the lowest ranks of each row set to zero; the total is `rate` to within half a weight."""
    rows, width = w_OI.shape
    rows_O = torch.arange(rows + 1, dtype=widest(w_OI.device), device=w_OI.device)
    return w_OI.where(hard_mask(ranks_OI, (rate * width * rows_O).round().diff()), 0)


def _from_dense(
    survey: Survey, dense_NTC: HiddenStates, pruned: Sequence[HiddenStates], tokens_NT: Tensor
) -> list[float]:
    """The divergence of each pruned path from the dense path, from the outputs of the last block."""
    divergences_NP: list[Tensor] = []
    at_once = tokens_at_once(vocabulary(survey.decoder.model), LOGITS)
    with survey.decoder.outside_blocks(survey.device):
        for n, sequence_T in enumerate(tokens_NT[survey.share(tokens_NT).places]):
            paths = [
                fetched(path_NTC[n : n + 1], survey.device).split(at_once, dim=1) for path_NTC in [dense_NTC, *pruned]
            ]
            parts = zip(sequence_T[None].split(at_once, dim=1), *paths, strict=True)
            divergences_NP.append(torch.stack([_of_tokens(survey, *part) for part in parts]).sum(dim=0))
    of_ranks = ranks.all_of(torch.stack(divergences_NP).tolist() if divergences_NP else [])
    sequences = [of_paths for of_rank in of_ranks for of_paths in of_rank]
    return [sum(of_path) / tokens_NT.numel() for of_path in zip(*sequences, strict=True)]


def _of_tokens(survey: Survey, tokens_NT: Tensor, dense_NTC: Tensor, *pruned: Tensor) -> Tensor:
    """The divergence (P,) of each pruned path from the dense path at some tokens of one sequence, in nats."""
    dense_TV = _predicted(survey, tokens_NT, dense_NTC)
    predicted = (_predicted(survey, tokens_NT, y_NTC) for y_NTC in pruned)
    return torch.stack([kl_div(own_TV, dense_TV, log_target=True, reduction="sum") for own_TV in predicted])


def _predicted(survey: Survey, tokens_NT: Tensor, y_NTC: Tensor) -> Tensor:
    """Log-probabilities (T, V), float32, of the next token, from the outputs `y_NTC` of the last block."""
    return logits_of(survey.decoder.model, survey.decoder.blocks, tokens_NT, y_NTC)[0].float().log_softmax(dim=-1)
