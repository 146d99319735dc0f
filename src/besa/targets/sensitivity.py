"""Sensitivity: blocks whose weights matter more to the model's loss lose less.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, V vocabulary, O rows, I columns.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from besa.activations import HiddenStates, allocate
from besa.models.blocks import Block, capture_inputs, logits_of
from besa.models.streaming import Decoder
from besa.probes import RowSensitivities
from besa.statistics import collect
from besa.targets.bounded import Bounded, Survey

BINS = 1 << 16  # by the upper half of a float32's bits: scores are told apart to a hundredth


class LossSensitivity(Bounded):
    """One threshold for the whole model on W²·E[x²]·E[g²], of which every block goes a part of the way.

    g is the gradient of the loss at the linear's output, for labels drawn from the model's own predictions: the score
    is what a weight is worth by the diagonal of the Fisher information, the curvature of the distance from the dense
    model.
    """

    method: Literal["sensitivity"] = "sensitivity"
    strength: float = Field(default=0.5, ge=0, le=1, description="part of the way from uniform to that threshold")

    def measure(self, survey: Survey) -> list[float]:
        """The sparsity that each block wants: a forward and a backward pass, one block at a time in both directions."""
        decoder, blocks = survey.decoder, survey.decoder.blocks
        states = self._forward(survey)
        gradients_NTC = states.pop()
        _loss_gradients(decoder, gradients_NTC, self.tokens(survey), survey.seed)
        histograms = [torch.zeros(BINS, dtype=torch.int64)] * len(blocks)
        for block, names in reversed(list(zip(blocks, survey.names, strict=True))):
            with decoder.opened(block, survey.device):
                inputs_NTC = states.pop()
                histograms[block.index] = _scored(block, names, inputs_NTC, gradients_NTC, survey.device)
        upto = torch.stack(histograms).sum(dim=0).cumsum(0)
        place = int(torch.searchsorted(upto, round(survey.sparsity * int(upto[-1]))))
        found = [float(part[: place + 1].sum()) / max(1, int(part.sum())) for part in histograms]
        return [survey.sparsity + self.strength * (sparsity - survey.sparsity) for sparsity in found]

    def _forward(self, survey: Survey) -> list[HiddenStates]:
        """The inputs of every block and the outputs of the last, all kept."""
        decoder, tokens_NT = survey.decoder, self.tokens(survey)
        room = survey.activation_budget // (len(decoder.blocks) + 1)
        with decoder.embeddings():
            parts = capture_inputs(decoder.model, decoder.blocks, tokens_NT, survey.batch)
            states: list[HiddenStates] = [torch.cat(list(parts))]
        shape = (*tokens_NT.shape, states[0][:1].shape[-1])
        for block in decoder.blocks:
            states.append(allocate(shape, states[0][:1].dtype, room, survey.folder))
            with decoder.opened(block, survey.device):
                block.run(states[-2], survey.batch, into=states[-1])
        return states


def _loss_gradients(decoder: Decoder, states_NTC: HiddenStates, tokens_NT: Tensor, seed: int) -> None:
    """Replace the outputs of the last block by the gradients of the loss there, for labels drawn from the model."""
    generator = torch.Generator().manual_seed(seed)
    with decoder.ends():
        for n in range(len(tokens_NT)):
            y_NTC = states_NTC[n : n + 1].to(decoder.model.device).requires_grad_()
            with torch.enable_grad():
                logits_TV = logits_of(decoder.model, decoder.blocks, tokens_NT[n : n + 1], y_NTC)[0].float()
                chance_T = torch.rand(len(logits_TV), 1, generator=generator).to(logits_TV.device)
                labels_T = torch.searchsorted(logits_TV.detach().softmax(-1).cumsum(-1), chance_T)[:, 0]
                labels_T = labels_T.clamp_max(logits_TV.shape[-1] - 1)
                loss = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")
                states_NTC[n : n + 1] = torch.autograd.grad(loss, y_NTC)[0]


def _scored(
    block: Block, names: tuple[str, ...], inputs_NTC: HiddenStates, gradients_NTC: HiddenStates, device: torch.device
) -> Tensor:
    """How many weights of a block have which score (BINS,); the gradients at its output become those at its input."""
    rows = RowSensitivities(block)
    with collect(block.module, block.prunables, gram=False) as statistics:
        for n in range(len(inputs_NTC)):
            one = slice(n, n + 1)
            gradients_NTC[one] = rows.send_back(inputs_NTC[one].to(device), gradients_NTC[one])
    histogram = torch.zeros(BINS, dtype=torch.int64)
    for name in names:
        column_I, row_O = statistics[name].squares_I.float(), rows.rows(name)
        score_OI = block.weight(name).detach().float().square() * column_I * row_O[:, None]
        histogram += torch.bincount((score_OI.view(torch.int32) >> 16).flatten(), minlength=BINS).cpu()
    return histogram
