"""One threshold for the whole model on what a weight is worth to its loss, by the diagonal of the Fisher information.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, V vocabulary, O rows, I columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from besa.methods.targets.bounded import Survey
from besa.models.activations import HiddenStates
from besa.models.blocks import Block, logits_of
from besa.models.streaming import Decoder
from besa.observing.input_statistics import InputStatistics, collect
from besa.observing.probes import RowSensitivities

BINS = 1 << 16  # by the upper half of a float32's bits: scores are told apart to a hundredth


@dataclass(frozen=True)
class Threshold:
    """What one threshold does to the blocks of a model.

    Attributes:
        sparsity: of the model.
        rates: the sparsity of each block.
        statistics: of the dense model's inputs, by full name of the matrix.
    """

    sparsity: float
    rates: list[float]
    statistics: dict[str, InputStatistics]

    def part_way(self, strength: float) -> list[float]:
        """The sparsity of each block a part of the way from the model's to the threshold's."""
        return [self.sparsity + strength * (rate - self.sparsity) for rate in self.rates]


def one_threshold(survey: Survey, tokens_NT: Tensor) -> Threshold:
    """Prune the lowest W²·E[x²]·E[g²] of the whole model.

    g is the gradient of the loss at the linear's output, for labels drawn from the model's own predictions: the score
    is a weight's part in the curvature of the distance from the dense model. It takes a forward and a backward pass,
    one block at a time in both directions.

    Args:
        survey: whose model is looked at.
        tokens_NT: sequences to look at it with.
    """
    decoder, blocks = survey.decoder, survey.decoder.blocks
    states = _forward(survey, tokens_NT)
    gradients_NTC = states.pop()
    _loss_gradients(decoder, gradients_NTC, tokens_NT, survey.seed)
    histograms = [torch.zeros(BINS, dtype=torch.int64)] * len(blocks)
    statistics: dict[str, InputStatistics] = {}
    for block, names in reversed(list(zip(blocks, survey.names, strict=True))):
        with decoder.opened(block, survey.device):
            rows, found = _send_back(block, states.pop(), gradients_NTC, survey.device)
            histograms[block.index] = _histogram(block, names, rows, found)
        statistics |= found
    upto = torch.stack(histograms).sum(dim=0).cumsum(0)
    place = int(torch.searchsorted(upto, round(survey.sparsity * int(upto[-1]))))
    rates = [float(part[: place + 1].sum()) / max(1, int(part.sum())) for part in histograms]
    return Threshold(survey.sparsity, rates, statistics)


def _forward(survey: Survey, tokens_NT: Tensor) -> list[HiddenStates]:
    """The inputs of every block and the outputs of the last, all kept."""
    first_NTC = survey.embedded(tokens_NT)
    states: list[HiddenStates] = [first_NTC]
    for block in survey.decoder.blocks:
        states.append(survey.room_like(first_NTC, len(survey.decoder.blocks) + 1))
        with survey.decoder.opened(block, survey.device):
            block.run(states[-2], survey.batch, into=states[-1])
    return states


def _loss_gradients(decoder: Decoder, states_NTC: HiddenStates, tokens_NT: Tensor, seed: int) -> None:
    """Replace the outputs of the last block by the gradients of the loss there, for labels drawn from the model."""
    generator = torch.Generator().manual_seed(seed)
    with decoder.outside_blocks():
        for n in range(len(tokens_NT)):
            y_NTC = states_NTC[n : n + 1].to(decoder.model.device).requires_grad_()
            with torch.enable_grad():
                logits_TV = logits_of(decoder.model, decoder.blocks, tokens_NT[n : n + 1], y_NTC)[0].float()
                chance_T = torch.rand(len(logits_TV), 1, generator=generator).to(logits_TV.device)
                labels_T = torch.searchsorted(logits_TV.detach().softmax(-1).cumsum(-1), chance_T)[:, 0]
                labels_T = labels_T.clamp_max(logits_TV.shape[-1] - 1)
                loss = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")
                states_NTC[n : n + 1] = torch.autograd.grad(loss, y_NTC)[0]


def _send_back(
    block: Block, inputs_NTC: HiddenStates, gradients_NTC: HiddenStates, device: torch.device
) -> tuple[RowSensitivities, dict[str, InputStatistics]]:
    """What a block's rows and columns are like; the gradients at its output become those at its input."""
    rows = RowSensitivities(block)
    with collect(block.module, block.prunables, gram=False) as statistics:
        for n in range(len(inputs_NTC)):
            one = slice(n, n + 1)
            gradients_NTC[one] = rows.send_back(inputs_NTC[one].to(device), gradients_NTC[one])
    return rows, statistics


def _histogram(
    block: Block, names: tuple[str, ...], rows: RowSensitivities, statistics: dict[str, InputStatistics]
) -> Tensor:
    """How many weights of a block have which score (BINS,)."""
    histogram = torch.zeros(BINS, dtype=torch.int64)
    for name in names:
        column_I, row_O = statistics[name].squares_I.float(), rows.rows(name)
        score_OI = block.weight(name).detach().float().square() * column_I * row_O[:, None]
        histogram += torch.bincount((score_OI.view(torch.int32) >> 16).flatten(), minlength=BINS).cpu()
    return histogram
