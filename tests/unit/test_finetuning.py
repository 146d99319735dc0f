"""Masked fine-tuning of a block: closer to the dense path on what it never saw, and zeros stay zeros."""

import pytest
import torch
from torch import nn

from besa.methods.finetuning import FinetuningProblem, MaskedAdam, NoFinetuning, adam
from besa.models.blocks import Block
from besa.models.prunable import find_prunables
from besa.observing.losses import token_weighted_error
from besa.system.ranks import Share

TOKENS, WIDTH = 6, 8
WHOLE = Share.whole(33)


class Residual(nn.Module):
    """Two linears in a row, added to the input."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16, bias=False), nn.Linear(16, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


@pytest.fixture
def task():
    """A block with half of its weights zero, 33 sequences, and what it puts out when dense."""
    torch.manual_seed(0)
    module = Residual().requires_grad_(False)
    arguments = {(n, TOKENS): {} for n in range(1, 34)}
    block = Block(0, "b", module, find_prunables(module), arguments)
    inputs_NTC = torch.randn(33, TOKENS, WIDTH)
    targets_NTC = module(inputs_NTC)
    for name in block.prunables:
        w_OI = block.weight(name)
        w_OI[w_OI.abs() < w_OI.abs().median()] = 0
    return block, list(block.prunables), inputs_NTC, targets_NTC


def held_out_error(block, weights, inputs_NTC, targets_NTC) -> float:
    return float(token_weighted_error(block(inputs_NTC[::8], weights), targets_NTC[::8], 0))


def test_token_weighted_error_by_hand():
    target_NTC = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    y_NTC = torch.tensor([[[3.0, 2.0], [3.0, 1.0]]])
    for power in (0, 1, 2):  # squared errors 4 and 9, norms 5 and 1
        expected = (4 / 5**power + 9) / (25 / 5**power + 1)
        assert float(token_weighted_error(y_NTC, target_NTC, power)) == pytest.approx(expected)
    silent_NTC = torch.zeros(1, 1, 2)
    assert float(token_weighted_error(silent_NTC, silent_NTC, 1)) == 0


def test_a_token_that_should_be_silent_does_not_rule_the_loss():
    target_NTC = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    y_NTC = torch.tensor([[[3.0, 2.0], [0.1, 0.0]]])
    for power in (0, 1, 2):  # squared errors 4 and 0.01, norms 5 and 0
        expected = (4 / 5**power + 0.01) / (25 / 5**power)
        assert float(token_weighted_error(y_NTC, target_NTC, power)) == pytest.approx(expected)


def test_nothing_moves_untuned(task):
    found = NoFinetuning().tune(FinetuningProblem(*task, WHOLE, seed=0))
    assert (found.weights, found.losses) == ({}, [])


@pytest.mark.parametrize("options", [{"token_power": 0}, {"token_power": 1}, {"loss": "channel"}])
def test_kept_weights_move_to_a_lower_error(task, options):
    block, names, inputs_NTC, targets_NTC = task
    before = {name: block.weight(name).clone() for name in names}
    found = MaskedAdam(epochs=4, rate=0.02, autocast=False, **options).tune(FinetuningProblem(*task, WHOLE, seed=0))
    assert len(found.losses) == 5
    assert found.losses[-1] < 0.8 * found.losses[0]
    for name in names:
        assert torch.equal(block.weight(name), before[name])
        assert torch.equal(found.weights[name] == 0, before[name] == 0)
    after = held_out_error(block, found.weights, inputs_NTC, targets_NTC)
    assert after < 0.9 * held_out_error(block, before, inputs_NTC, targets_NTC)


def test_losses_are_of_the_sequences_that_are_held_out(task):
    block, names, inputs_NTC, targets_NTC = task
    found = MaskedAdam(epochs=1, token_power=0, autocast=False).tune(FinetuningProblem(*task, WHOLE, seed=0))
    weights = [{name: block.weight(name) for name in names}, found.weights]
    for loss, part in zip(found.losses, weights, strict=True):
        by_hand = [
            float(token_weighted_error(block(inputs_NTC[n : n + 1], part), targets_NTC[n : n + 1], 0))
            for n in range(0, 33, 8)
        ]
        assert loss == pytest.approx(sum(by_hand) / 5, rel=1e-5)


def test_an_epoch_that_does_harm_is_the_last_and_is_forgotten(task):
    block, names, *_ = task
    found = MaskedAdam(epochs=9, rate=5.0, autocast=False).tune(FinetuningProblem(*task, WHOLE, seed=0))
    assert len(found.losses) == 2
    assert found.losses[1] > found.losses[0]
    assert all(torch.equal(found.weights[name], block.weight(name)) for name in names)


def test_only_what_is_named_moves(task):
    block, _, inputs_NTC, targets_NTC = task
    problem = FinetuningProblem(block, ["up"], inputs_NTC, targets_NTC, WHOLE, seed=0)
    assert set(MaskedAdam(autocast=False).tune(problem).weights) == {"up"}


def test_one_sequence_is_learned_from_and_judged_by(task):
    block, names, inputs_NTC, targets_NTC = task
    problem = FinetuningProblem(block, names, inputs_NTC[:1], targets_NTC[:1], Share.whole(1), seed=0)
    found = MaskedAdam(rate=0.01, autocast=False).tune(problem)
    assert found.losses[-1] < found.losses[0]


def test_a_seed_decides_the_order(task):
    problems = [FinetuningProblem(*task, WHOLE, seed=seed) for seed in (0, 0, 1)]
    runs = [MaskedAdam(epochs=1, autocast=False).tune(problem).weights["up"] for problem in problems]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_half_precision_weights_stay_so_and_learn_in_full(task):
    block, names, inputs_NTC, targets_NTC = task
    block.module.bfloat16()
    problem = FinetuningProblem(block, names, inputs_NTC.bfloat16(), targets_NTC.bfloat16(), WHOLE, seed=0)
    found = MaskedAdam(epochs=4, rate=1e-3).tune(problem)
    assert found.losses[-1] < found.losses[0]
    for name in names:
        assert found.weights[name].dtype == torch.bfloat16
        assert torch.equal(found.weights[name] == 0, block.weight(name) == 0)


@pytest.mark.parametrize("scaled", [True, False])
def test_float16_learns_although_its_gradients_underflow(task, monkeypatch, scaled):
    block, names, inputs_NTC, targets_NTC = task
    block.module.half()
    # The gradient of each output is small where there are many outputs.
    monkeypatch.setattr(adam, "token_weighted_error", lambda *given: 1e-7 * token_weighted_error(*given))
    if not scaled:
        monkeypatch.setattr(adam, "loss_scaler", lambda *_: torch.amp.GradScaler("cpu", enabled=False))
    problem = FinetuningProblem(block, names, inputs_NTC.half(), targets_NTC.half(), WHOLE, seed=0)
    tuned = MaskedAdam(epochs=4, rate=0.02).tune(problem)
    assert (tuned.losses[-1] < 0.8 * tuned.losses[0]) == scaled


def test_several_sequences_a_step_take_fewer_and_larger_steps(task, monkeypatch):
    """Four sequences a step: the first step is along the mean gradient of four, and twice as large."""
    rates = []

    class Watched(torch.optim.Adam):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            return super().step()

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    one = MaskedAdam(epochs=1, rate=0.01, autocast=False).tune(FinetuningProblem(*task, WHOLE, seed=0))
    steps, first = len(rates), rates[0]
    rates.clear()
    four = MaskedAdam(epochs=1, rate=0.01, batch=4, autocast=False).tune(FinetuningProblem(*task, WHOLE, seed=0))
    assert (steps, len(rates)) == (28, 7)  # of 33 sequences, 5 are held out
    assert rates[0] == pytest.approx(2 * first)
    assert four.losses[-1] < four.losses[0] == one.losses[0]
