"""Prunable matrices whatever way round, and however many together, a block stores them."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from besa.models.prunable import Prunable, find_prunables, replaced

EXPERTS, HIDDEN, INNER = 3, 4, 5


class Experts(nn.Module):
    """Gated experts in two stacks, (E, O, I) or (E, I, O), that each token all goes through."""

    def __init__(self, transposed: bool, says_so: bool = False):
        super().__init__()
        up, down = (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
        if transposed:
            up, down = (EXPERTS, HIDDEN, 2 * INNER), (EXPERTS, INNER, HIDDEN)
        self.gate_up = nn.Parameter(torch.randn(up))
        self.gate_up_bias = nn.Parameter(torch.randn(EXPERTS, 2 * INNER))
        self.down = nn.Parameter(torch.randn(down))
        self.transposed = transposed
        if says_so:
            self.is_transposed = transposed

    def forward(self, x_TC):
        y_TC = torch.zeros_like(x_TC)
        for gate_up, bias, down in zip(self.gate_up, self.gate_up_bias, self.down, strict=True):
            if not self.transposed:
                gate_up, down = gate_up.T, down.T
            gate_TI, up_TI = (x_TC @ gate_up + bias).chunk(2, dim=-1)
            y_TC = y_TC + (functional.silu(gate_TI) * up_TI) @ down
        return y_TC


class Mixture(nn.Module):
    """A block of everything: a linear, a Conv1D, a router, and stacked experts."""

    def __init__(self, transposed: bool):
        super().__init__()
        self.attention = nn.Linear(HIDDEN, 6)
        self.back = Conv1D(HIDDEN, 6)
        self.norm = nn.LayerNorm(HIDDEN)
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = Experts(transposed)

    def forward(self, x_TC):
        x_TC = self.norm(x_TC + self.back(self.attention(x_TC)))
        return self.experts(x_TC) * self.router(x_TC).softmax(dim=-1).amax(dim=-1, keepdim=True)


def expert_names(path: str) -> list[str]:
    return [f"{path}.{stack}.{expert}" for stack in ("gate_up", "down") for expert in range(EXPERTS)]


def test_linears_are_found_in_module_order():
    block = nn.ModuleDict({"up": nn.Linear(3, 5), "act": nn.GELU(), "down": nn.Linear(5, 1, bias=False)})
    found = find_prunables(block)
    assert found == {"up": Prunable("up.weight", 5, 3), "down": Prunable("down.weight", 1, 5)}
    assert list(found) == ["up", "down"]
    assert [prunable.numel for prunable in found.values()] == [15, 5]
    assert found["up"].of(block["up"].weight) is block["up"].weight


def test_a_conv1d_is_seen_with_its_outputs_as_rows():
    block = nn.ModuleDict({"c_fc": Conv1D(5, 3)})
    prunable = find_prunables(block)["c_fc"]
    assert prunable == Prunable("c_fc.weight", 5, 3, transposed=True)
    weight = block["c_fc"].weight.detach()
    w_OI = prunable.of(weight)
    assert w_OI.shape == (5, 3)
    w_OI[4] = 7
    assert weight[:, 4].tolist() == [7, 7, 7]  # one output channel
    x_TI = torch.randn(2, 3)
    torch.testing.assert_close(block["c_fc"](x_TI), x_TI @ w_OI.T + block["c_fc"].bias)


@pytest.mark.parametrize("says_so", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_expert_stacks_are_found_both_ways_round(transposed, says_so):
    block = nn.ModuleDict({"experts": Experts(transposed, says_so)})
    found = find_prunables(block)
    assert list(found) == expert_names("experts")
    assert found["experts.gate_up.1"] == Prunable("experts.gate_up", 2 * INNER, HIDDEN, transposed, 1)
    assert found["experts.down.2"] == Prunable("experts.down", HIDDEN, INNER, transposed, 2)
    stack = block["experts"].gate_up.detach()
    w_OI = found["experts.gate_up.1"].of(stack)
    assert w_OI.shape == (2 * INNER, HIDDEN)
    w_OI.zero_()
    assert [bool((matrix == 0).all()) for matrix in stack] == [False, True, False]


def test_places_of_experts_that_compute_nothing_hold_no_matrix():
    """LongCat's gates have places for them, which nothing multiplies with, and its down projections have none."""
    experts = Experts(transposed=False)
    experts.gate_up = nn.Parameter(torch.zeros(5, *experts.gate_up.shape[1:]))
    assert list(find_prunables(nn.ModuleDict({"experts": experts}))) == expert_names("experts")


def test_what_a_module_says_of_its_layout_overrules_the_shapes():
    experts = Experts(transposed=False)
    experts.is_transposed = True
    assert find_prunables(nn.ModuleDict({"e": experts}))["e.gate_up.0"].rows == HIDDEN


def test_a_stack_of_its_own_is_stored_outputs_first():
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(2, 5, 3))
    assert find_prunables(nn.ModuleDict({"input": module})) == {
        f"input.weight.{expert}": Prunable("input.weight", 5, 3, expert=expert) for expert in range(2)
    }


def test_routers_stay_dense():
    """As many outputs as experts, or one output beside experts; without experts, both are linears like any other."""
    linears = {"chooser": nn.Linear(4, EXPERTS), "shared_gate": nn.Linear(4, 1), "up": nn.Linear(4, 6)}
    assert list(find_prunables(nn.ModuleDict(linears))) == ["chooser", "shared_gate", "up"]
    stacked = nn.ModuleDict({**linears, "experts": Experts(False)})
    assert list(find_prunables(stacked)) == ["up", *expert_names("experts")]
    listed = nn.ModuleDict({**linears, "experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(EXPERTS))})
    assert list(find_prunables(listed)) == ["up", *(f"experts.{expert}" for expert in range(EXPERTS))]


def test_lists_of_unlike_modules_are_no_experts():
    steps = nn.ModuleList([nn.Linear(4, 3), nn.GELU(), nn.LayerNorm(3)])
    assert list(find_prunables(nn.ModuleDict({"steps": steps}))) == ["steps.0"]
    alone = nn.ModuleList([nn.Linear(4, 1)])
    assert list(find_prunables(nn.ModuleDict({"alone": alone}))) == ["alone.0"]


def test_convolutions_are_no_experts():
    block = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 2), "gate": nn.Linear(4, 4)})  # weight (4, 4, 2): a stack of four?
    assert list(find_prunables(block)) == ["gate"]


@pytest.mark.parametrize("transposed", [False, True])
def test_routers_and_biases_of_experts_are_not_prunable(transposed):
    block = Mixture(transposed)
    known = {prunable.parameter for prunable in find_prunables(block).values()}
    dense = [(name, p.numel()) for name, p in block.named_parameters() if p.dim() > 1 and name not in known]
    assert dense == [("router.weight", EXPERTS * HIDDEN), ("experts.gate_up_bias", EXPERTS * 2 * INNER)]


@pytest.mark.parametrize("transposed", [False, True])
def test_replaced_gives_its_gradient_to_each_matrix(transposed):
    torch.manual_seed(0)
    block, x_TC = Mixture(transposed).double(), torch.randn(7, HIDDEN, dtype=torch.float64)
    prunables, parameters = find_prunables(block), dict(block.named_parameters())
    weights = {
        name: torch.randn(prunable.rows, prunable.columns, dtype=torch.float64, requires_grad=True)
        for name, prunable in prunables.items()
    }
    changed = replaced(parameters, prunables, weights)
    assert set(changed) == {prunable.parameter for prunable in prunables.values()}
    assert all(changed[name].shape == parameters[name].shape for name in changed)
    y_TC = functional_call(block, changed, (x_TC,))
    y_TC.square().sum().backward()

    with torch.no_grad():
        for name, prunable in prunables.items():
            prunable.of(parameters[prunable.parameter]).copy_(weights[name])
    block.zero_grad()
    expected_TC = block(x_TC)
    torch.testing.assert_close(y_TC, expected_TC)
    expected_TC.square().sum().backward()
    for name, prunable in prunables.items():
        wanted_OI = prunable.of(parameters[prunable.parameter].grad)
        assert wanted_OI.abs().max() > 0
        torch.testing.assert_close(weights[name].grad, wanted_OI)


@pytest.mark.parametrize("transposed", [False, True])
def test_replaced_keeps_the_experts_it_is_not_given(transposed):
    block = nn.ModuleDict({"experts": Experts(transposed)}).requires_grad_(False)
    prunables, parameters = find_prunables(block), dict(block.named_parameters())
    before = parameters["experts.down"].clone()
    changed = replaced(parameters, prunables, {"experts.down.1": torch.zeros(HIDDEN, INNER)})
    assert list(changed) == ["experts.down"]
    assert torch.equal(parameters["experts.down"], before)
    before[1] = 0
    assert torch.equal(changed["experts.down"], before)
    assert replaced(parameters, prunables, {}) == {}
