"""One threshold for a block: exact counts against a sort of everything, and sensitivities against a Jacobian."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from besa.counting.budget import Budget
from besa.counting.masks import rank
from besa.errors import BesaError
from besa.methods.allocation import BlockProblem, RankedLinear, Sensitivity
from besa.methods.allocation.sensitivity import lowest
from besa.models.blocks import Block
from besa.models.prunable import Prunable, find_prunables
from besa.observing.probes import RowSensitivities
from besa.system.ranks import Share

TOKENS, WIDTH = 3, 4


class Gated(nn.Module):
    """Two linears of one input, multiplied, and a third that brings them back."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, 5, bias=False) for _ in range(2))
        self.down = nn.Linear(5, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down(self.gate(x).tanh() * self.up(x))


@pytest.fixture
def block():
    torch.manual_seed(0)
    module = Gated().requires_grad_(False)
    return Block(0, "b", module, find_prunables(module), {(1, TOKENS): {}})


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_lowest_keys_are_those_of_a_sort(data):
    """Ties fall to the earlier matrix, then to the earlier row."""
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4))
    largest = data.draw(st.sampled_from([1, 5, 70_000, 0x7F800001]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    keys = [torch.randint(0, largest + 1, shape, generator=generator, dtype=torch.int32) for shape in shapes]
    total = data.draw(st.integers(0, sum(key.numel() for key in keys)))
    order = sorted(
        (value, at, row) for at, key in enumerate(keys) for row, part in enumerate(key.tolist()) for value in part
    )
    expected = [
        [sum(1 for _, k, r in order[:total] if (k, r) == (at, row)) for row in range(len(key))]
        for at, key in enumerate(keys)
    ]
    found = lowest([lambda key=key: key for key in keys], total)
    assert [counts_O.tolist() for counts_O in found] == expected


def test_row_sensitivities_are_means_of_squared_gradients(block):
    """Over all tokens of all sequences; each linear's output is moved by hand."""
    x_NTC, seeds_NTC = torch.randn(2, 5, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    found = RowSensitivities(block)
    for n in range(5):
        found.send_back(x_NTC[n : n + 1], seeds_NTC[n : n + 1])
    module = block.module
    for name in ("gate", "up", "down"):
        linear = getattr(module, name)
        inputs = {"gate": x_NTC, "up": x_NTC, "down": module.gate(x_NTC).tanh() * module.up(x_NTC)}[name]

        def moved(y, name=name):
            gate, up = (y if name == part else getattr(module, part)(x_NTC) for part in ("gate", "up"))
            return y if name == "down" else module.down(gate.tanh() * up)

        _, gradients = torch.autograd.functional.vjp(moved, linear(inputs), seeds_NTC)
        torch.testing.assert_close(found.rows(name), gradients.square().mean(dim=(0, 1)))


def test_gradients_go_on_to_the_input(block):
    x_NTC, seeds_NTC = torch.randn(2, 1, TOKENS, WIDTH)
    _, expected_NTC = torch.autograd.functional.vjp(block, x_NTC, seeds_NTC)
    torch.testing.assert_close(RowSensitivities(block).send_back(x_NTC, seeds_NTC), expected_NTC)


def test_weights_get_no_gradient_and_unreached_rows_none(block):
    block.module.requires_grad_(True)
    block.prunables["spare"] = Prunable("spare.weight", 7, 2)
    block.module.spare = nn.Linear(2, 7)
    found = RowSensitivities(block)
    found.send_back(torch.ones(1, TOKENS, WIDTH), torch.ones(1, TOKENS, WIDTH))
    assert all(parameter.grad is None for parameter in block.module.parameters())
    assert found.rows("spare").tolist() == [0] * 7


@pytest.fixture
def problem(block):
    """Half of everything to go; `power` 1 and importances such that errors are easily computed."""
    x_NTC = torch.randn(9, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    linears = {}
    for name in block.prunables:
        w_OI = block.weight(name).clone()
        linears[name] = RankedLinear(w_OI, w_OI.abs(), rank(w_OI.abs(), w_OI))
    budgets, share = [Budget(tuple(linears), 60, 30)], Share.whole(len(x_NTC))
    gradients = {name: torch.rand(len(linear.w_OI)) for name, linear in linears.items()}
    return BlockProblem(block, linears, x_NTC, x_NTC, budgets, 4, share, gradients=gradients)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("zeros", [1, 17, 30, 59])
def test_one_threshold_for_the_block(problem, power, zeros):
    linears = {name: dataclasses.replace(linear, power=power) for name, linear in problem.linears.items()}
    problem = dataclasses.replace(problem, linears=linears, budgets=[Budget(tuple(linears), 60, zeros)])
    counts = Sensitivity(strength=1).allocate(problem).counts
    by_name = {
        name: linear.importance_OI.pow(power) * problem.gradients[name][:, None] for name, linear in linears.items()
    }
    threshold = torch.cat([part.flatten() for part in by_name.values()]).sort().values[zeros - 1]
    for name, part in by_name.items():
        assert counts[name].tolist() == (part <= threshold).sum(dim=1).tolist()
        assert counts[name].dtype == torch.int64


def test_strength_is_the_part_of_the_way_to_the_threshold(problem):
    """Rates of a quarter of the way are met as exactly as whole weights allow."""
    uniform, part, threshold = (Sensitivity(strength=strength).allocate(problem).counts for strength in (0, 0.25, 1))
    for name, linear in problem.linears.items():
        width = linear.w_OI.shape[1]
        expected_O = width / 2 + 0.25 * (threshold[name] - width / 2)
        assert ((part[name] - expected_O).abs() < 1).all()
        assert (uniform[name] - width / 2).abs().max() < 1
    assert sum(int(counts_O.sum()) for counts_O in part.values()) == 30


def test_budgets_apart_have_thresholds_of_their_own(problem):
    budgets = [Budget(("gate", "down"), 40, 10), Budget(("up",), 20, 15)]
    counts = Sensitivity().allocate(dataclasses.replace(problem, budgets=budgets)).counts
    assert int(counts["gate"].sum() + counts["down"].sum()) == 10
    assert int(counts["up"].sum()) == 15


def test_what_no_token_reached_keeps_the_sparsity_of_its_budget(problem):
    """On the pruned path, or where gradients are measured."""
    linears = problem.linears | {"up": dataclasses.replace(problem.linears["up"], reached=False)}
    gradients = problem.gradients | {"up": torch.zeros(5)}
    counts = Sensitivity().allocate(dataclasses.replace(problem, linears=linears)).counts
    also = Sensitivity().allocate(dataclasses.replace(problem, gradients=gradients)).counts
    assert all(torch.equal(counts[name], also[name]) for name in counts)
    assert counts["up"].tolist() == [2] * 5
    assert sum(int(part.sum()) for part in counts.values()) == 30


def test_zeros_go_first_and_too_many_are_refused(problem):
    w_OI = problem.linears["up"].w_OI.clone()
    w_OI[:3] = 0
    up = RankedLinear(w_OI, torch.full_like(w_OI, 9.0), rank(w_OI.abs(), w_OI))
    problem = dataclasses.replace(problem, linears=problem.linears | {"up": up})
    assert Sensitivity().allocate(problem).counts["up"][:3].tolist() == [4, 4, 4]
    with pytest.raises(BesaError, match="12 zeros already and cannot have exactly 11"):
        Sensitivity().allocate(dataclasses.replace(problem, budgets=[Budget(tuple(problem.linears), 60, 11)]))


class AtOnce(nn.Module):
    """Two experts that are multiplied at once, each with a half of the tokens."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, WIDTH, WIDTH))

    def forward(self, x):
        return x + torch.bmm(x.reshape(2, -1, WIDTH), self.stack.transpose(1, 2)).reshape(x.shape)


class OnTheLeft(nn.Module):
    """A linear whose weight stands on the left."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + (self.linear.weight @ x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("kind", [AtOnce, OnTheLeft])
def test_gradients_reach_matrices_however_they_are_multiplied(kind):
    module = kind().requires_grad_(False)
    block = Block(0, "b", module, find_prunables(module), {(1, 4): {}})
    rows, seeds_NTC = RowSensitivities(block), torch.randn(1, 4, WIDTH)
    rows.send_back(torch.randn(1, 4, WIDTH), seeds_NTC)
    halves = seeds_NTC[0].split(2) if kind is AtOnce else [seeds_NTC[0]]
    for name, own_TC in zip(block.prunables, halves, strict=True):
        torch.testing.assert_close(rows.rows(name), own_TC.square().mean(dim=0))


class Zeroed(nn.Module):
    """Two experts that get all tokens, zeros for those of the other, as in Llama 4; their outputs are added."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(2, WIDTH, WIDTH)) for _ in range(2))

    def forward(self, x):
        chosen = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0]])[..., None]
        up = torch.bmm(x * chosen, self.up.transpose(1, 2))
        return x + torch.bmm(up * up, self.down.transpose(1, 2)).sum(dim=0, keepdim=True)


def test_experts_are_judged_on_the_tokens_that_were_chosen_for_them():
    module = Zeroed().requires_grad_(False)
    block = Block(0, "b", module, find_prunables(module), {(1, 4): {}})
    x_NTC, seeds_NTC = torch.randn(2, 1, 4, WIDTH)
    rows = RowSensitivities(block)
    rows.send_back(x_NTC, seeds_NTC)
    for expert, tokens in ((0, [0, 3]), (1, [1, 2])):
        x_TC, seeds_TC = x_NTC[0, tokens], seeds_NTC[0, tokens]
        up_TC = x_TC @ module.up[expert].T
        expected = {"up": 2 * up_TC * (seeds_TC @ module.down[expert]), "down": seeds_TC}
        for name, gradients_TC in expected.items():
            torch.testing.assert_close(rows.rows(f"{name}.{expert}"), gradients_TC.square().mean(dim=0))
