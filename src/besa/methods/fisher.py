"""How much the model's loss depends on its weights: the diagonal of the Fisher information, from the dense model.

Labels are sampled from the model's predictions, not taken from the text, so this estimates the true Fisher information,
not the empirical one.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, V vocabulary, O rows, I columns,
B blocks, S bins of scores, X structures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from besa.counting.precision import widest
from besa.errors import BesaError
from besa.kernels import histogram
from besa.methods.survey import Survey
from besa.models.activations import HiddenStates
from besa.models.blocks import Block
from besa.models.couplings import Coupling
from besa.models.ends import logits_of
from besa.models.sizes import vocabulary
from besa.models.streaming import Decoder
from besa.models.transfers import Outputs, fetched
from besa.observing.input_statistics import InputStatistics, collect
from besa.observing.prediction_loss import tokens_at_once
from besa.observing.probes import RowSensitivities

LOGITS = 1 << 29  # bytes of float32 logits at a time; some five tensors of that size are alive at once
BINS = 1 << 15  # the upper half of a float32's bits: scores that differ by more than a hundredth are in different bins
INFINITE = 0x7F80  # the bin of infinity; those of NaN come after it


@dataclass(frozen=True)
class LossGradients:
    """What the gradients of a dense model's loss show, for labels drawn from the model's own predictions.

    Attributes:
        sparsity: of the model.
        rates: sparsity of each block if the weights of lowest W²·E[x²]·E[g²] of the whole model go, where g is the
            gradient at the linear's output. The score approximates W² times the weight's diagonal entry of the Fisher
            information. Structures that go whole have the sum over their columns, divided by their weights. Matrices
            that no token reached are left out; a block of such alone has the model's sparsity.
        squares: E[g²] of each row (O,), float32, on the host, by full name of the matrix.
        statistics: of the matrices' inputs, by full name.
    """

    sparsity: float
    rates: list[float]
    squares: dict[str, Tensor]
    statistics: dict[str, InputStatistics]

    def part_way(self, strength: float) -> list[float]:
        """A sparsity for each block between that of the model (`strength` 0) and that of the threshold (1)."""
        return [self.sparsity + strength * (rate - self.sparsity) for rate in self.rates]


def loss_gradients(survey: Survey, every: int) -> LossGradients:
    """Measure gradients of the loss on one calibration sequence in `every`; the survey keeps them for the next call.

    Measuring takes a forward pass, then a forward and a backward pass, one block at a time in both directions.

    Args:
        survey: the model.
        every: 1 measures all calibration sequences.

    Raises:
        BesaError: gradients are NaN or infinite.
    """
    if every not in survey.gradients:
        survey.gradients[every] = _measured(survey, survey.calibration.tokens_NT[::every])
    return survey.gradients[every]


def _measured(survey: Survey, tokens_NT: Tensor) -> LossGradients:
    blocks = survey.decoder.blocks
    states = _forward(survey, tokens_NT)
    gradients_NTC = states.pop()
    _loss_gradients(survey, gradients_NTC, tokens_NT)
    histograms: dict[int, Tensor] = {}
    squares: dict[str, Tensor] = {}
    statistics: dict[str, InputStatistics] = {}
    for block, names in reversed(list(zip(blocks, survey.names, strict=True))):
        with survey.opened(block, step=-1):
            rows, inputs = _send_back(block, states.pop(), gradients_NTC, survey.device)
            structures = survey.structures[block.index]
            histograms[block.index] = (
                _of_structures(block, structures, rows, inputs)
                if structures
                else _histogram(block, names, rows, inputs)
            )
            squares |= {name: rows.rows(name).cpu() for name in block.prunables}
        statistics |= inputs
    upto_BS = torch.stack([histograms[block.index] for block in blocks]).cumsum(dim=1)
    upto_S = upto_BS.sum(dim=0)
    whole_B = torch.tensor([bool(structures) for structures in survey.structures]).to(upto_S.device)
    sizes_B = torch.tensor(survey.sizes).to(upto_S.device).where(whole_B, upto_BS[:, -1])  # else weights that compete
    place = (upto_S < (survey.sparsity * sizes_B.sum().to(widest(upto_S.device))).round()).sum()
    last = place.clamp_max(BINS - 1).reshape(1)
    beyond_B = upto_BS[:, -1] - upto_BS[:, INFINITE - 1]
    pruned, beyond, sizes = torch.stack([upto_BS.index_select(1, last)[:, 0], beyond_B, sizes_B]).tolist()
    if any(beyond):
        name = next(block.name for block, scores in reversed(list(zip(blocks, beyond, strict=True))) if scores)
        raise BesaError(
            f"The gradients of the loss at {name} have NaN or infinity: try --dtype float32, and check the model with "
            "`besa eval`."
        )
    rates = [zeros / size if size else survey.sparsity for zeros, size in zip(pruned, sizes, strict=True)]
    return LossGradients(survey.sparsity, rates, squares, statistics)


def _forward(survey: Survey, tokens_NT: Tensor) -> list[HiddenStates]:
    """The inputs of every block, and the outputs of the last block."""
    first_NTC = survey.embedded(tokens_NT)
    states: list[HiddenStates] = [first_NTC]
    for block in survey.decoder.blocks:
        states.append(survey.room.empty_like(first_NTC))
        with survey.opened(block):
            block.run(states[-2], survey.batch, into=states[-1])
    return states


def _loss_gradients(survey: Survey, states_NTC: HiddenStates, tokens_NT: Tensor) -> None:
    """Replace the outputs of the last block by the loss's gradients at them, for labels drawn from the predictions."""
    decoder, generator = survey.decoder, torch.Generator().manual_seed(survey.seed)
    gradients, share = Outputs(states_NTC, survey.device), survey.share(tokens_NT)
    chance_NT1 = torch.rand(*tokens_NT.shape, 1, generator=generator)[share.places]
    at_once = tokens_at_once(vocabulary(decoder.model), LOGITS)
    with decoder.outside_blocks(survey.device):
        for n, (sequence_T, chance_T1) in enumerate(zip(tokens_NT[share.places], chance_NT1, strict=True)):
            y_NTC = fetched(states_NTC[n : n + 1], survey.device)
            parts = zip(*(whole.split(at_once) for whole in (sequence_T, chance_T1, y_NTC[0])), strict=True)
            slopes = [_loss_gradient(decoder, *part) for part in parts]
            gradients.put(slice(n, n + 1), torch.cat(slopes, dim=1))
    gradients.finish()


def _loss_gradient(decoder: Decoder, tokens_T: Tensor, chance_T1: Tensor, y_TC: Tensor) -> Tensor:
    """The loss's gradient (1, T, C) at the outputs of the last block for some tokens of a sequence.

    Args:
        decoder: what is outside its blocks is on the device.
        tokens_T: of the text.
        chance_T1: numbers in [0, 1) that draw a label for each token from its prediction.
        y_TC: outputs of the last block.
    """
    y_NTC = y_TC[None].requires_grad_()
    with torch.enable_grad():
        logits_TV = logits_of(decoder.model, decoder.blocks, tokens_T[None], y_NTC)[0].float()
        chance_T1 = chance_T1.to(logits_TV.device)
        labels_T = torch.searchsorted(logits_TV.detach().softmax(-1).cumsum(-1), chance_T1)[:, 0]
        labels_T = labels_T.clamp_max(logits_TV.shape[-1] - 1)
        loss = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")
        return torch.autograd.grad(loss, y_NTC)[0]


def _send_back(
    block: Block, inputs_NTC: HiddenStates, gradients_NTC: HiddenStates, device: torch.device
) -> tuple[RowSensitivities, dict[str, InputStatistics]]:
    """Send gradients backward through a block: those at its outputs are replaced by those at its inputs.

    Returns:
        The sensitivities of the block's rows, and the statistics of its matrices' inputs by full name.
    """
    rows, gradients = RowSensitivities(block), Outputs(gradients_NTC, device)
    with collect(block.module, block.prunables, gram=False) as statistics:
        for n in range(len(inputs_NTC)):
            one = slice(n, n + 1)
            sent_NTC = rows.send_back(fetched(inputs_NTC[one], device), fetched(gradients_NTC[one], device))
            gradients.put(one, sent_NTC)
    gradients.finish()
    rows.add_up()
    return rows, statistics


def _histogram(
    block: Block, names: tuple[str, ...], rows: RowSensitivities, statistics: dict[str, InputStatistics]
) -> Tensor:
    """Number of weights of a block in each bin of scores (S,), int64; none of matrices that no token reached."""
    device = next(block.module.parameters()).device
    counts_S = torch.zeros(BINS, dtype=torch.int64, device=device)
    for name in names:
        reached = statistics[name].squares_I.any() & rows.rows(name).any()
        counts_S += histogram(_bins(_scores(block, name, rows, statistics)), BINS) * reached
    return counts_S


def _of_structures(
    block: Block, structures: list[Coupling], rows: RowSensitivities, statistics: dict[str, InputStatistics]
) -> Tensor:
    """Number of weights of a block's structures in each bin of scores (S,), int64."""
    device = next(block.module.parameters()).device
    counts_S = torch.zeros(BINS, dtype=torch.int64, device=device)
    for coupling in structures:
        ((reader, size),) = coupling.columns.items()
        score_I = _scores(block, reader, rows, statistics).sum(dim=0)
        score_X = score_I.reshape(coupling.structures, size).sum(dim=1) / coupling.weights
        counts_S += coupling.weights * histogram(_bins(score_X), BINS)
    return counts_S


def _bins(scores: Tensor) -> Tensor:
    """The bin of each score, which is not negative, but may be NaN of any sign."""
    return scores.view(torch.int32) >> 16 & BINS - 1


def _scores(block: Block, name: str, rows: RowSensitivities, statistics: dict[str, InputStatistics]) -> Tensor:
    """W²·E[x²]·E[g²] of a matrix (O, I), float32, up to the number of tokens."""
    column_I, row_O = statistics[name].squares_I.float(), rows.rows(name)
    return block.weight(name).detach().float().square() * column_I * row_O[:, None]
