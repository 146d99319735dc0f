"""Routers are told by where they stand, not by how many rows they have."""

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from besa.models.experts import find_experts
from besa.models.finding import find_blocks, left_dense
from besa.models.prunable import find_prunables

WIDTH, EXPERTS = 8, 4


def mlp(inner: int = EXPERTS) -> nn.ModuleDict:
    return nn.ModuleDict({"gate_proj": nn.Linear(WIDTH, inner), "down_proj": nn.Linear(inner, WIDTH)})


def stack() -> nn.Module:
    module = nn.Module()
    module.up = nn.Parameter(torch.zeros(EXPERTS, 6, WIDTH))
    return module


def block(**mixture: nn.Module) -> nn.ModuleDict:
    """A block whose attention, shared expert and latents all have as many rows as there are experts."""
    attention = nn.ModuleDict({"k_proj": nn.Linear(WIDTH, EXPERTS), "o_proj": nn.Linear(WIDTH, WIDTH)})
    return nn.ModuleDict({"attn": attention, "mlp": nn.ModuleDict({"shared": mlp(), **mixture})})


class Chooser(nn.Module):
    """A router that is no linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(EXPERTS, WIDTH))


class Biased(Chooser):
    """A router whose experts have biases, in a matrix of one row of a module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.Module()
        self.statistics.bias = nn.Parameter(torch.zeros(1, EXPERTS))


@pytest.mark.parametrize("experts", [stack(), nn.ModuleList(mlp(6) for _ in range(EXPERTS))], ids=["stack", "list"])
@pytest.mark.parametrize(
    ("beside", "routers"),
    [
        ({"gate": nn.Linear(WIDTH, EXPERTS)}, {"mlp.gate"}),
        ({"select": nn.Linear(WIDTH, EXPERTS)}, {"mlp.select"}),
        ({"gate": nn.ModuleDict({"wg": nn.Linear(WIDTH, EXPERTS)})}, {"mlp.gate.wg"}),
        ({"gate": nn.Linear(WIDTH, EXPERTS), "shared_gate": nn.Linear(WIDTH, 1)}, {"mlp.gate", "mlp.shared_gate"}),
        ({"latent": nn.Linear(WIDTH, EXPERTS), "gate": Chooser()}, {"mlp.gate"}),
        ({"gate": Biased()}, {"mlp.gate"}),
        ({"router": mlp(7)}, {"mlp.router", "mlp.router.gate_proj", "mlp.router.down_proj"}),
    ],
)
def test_a_router_stands_beside_experts(experts: nn.Module, beside: dict[str, nn.Module], routers: set[str]) -> None:
    whole = block(**beside, experts=experts)
    found = find_experts(whole)
    assert found.routers == routers
    assert found.holders == {"mlp.experts"}
    prunables = find_prunables(whole)
    linears = {path for path, module in whole.named_modules() if isinstance(module, nn.Linear)}
    assert linears - prunables.keys() == routers & linears
    assert {path for path, own in prunables.items() if own.routed} == {p for p in prunables if ".experts." in p}


def test_a_gate_may_weigh_shared_experts_too() -> None:
    """As of Inkling: two stacks, and a row for each expert of both."""
    shared = nn.Module()
    shared.up_proj = nn.Parameter(torch.randn(1, 5, WIDTH))
    whole = block(gate=nn.Linear(WIDTH, EXPERTS + 1), experts=stack(), shared_experts=shared)
    found = find_experts(whole)
    assert (found.holders, found.routers) == ({"mlp.experts"}, {"mlp.gate"})
    whole = block(other=nn.Linear(WIDTH, EXPERTS + 1), experts=stack(), shared_experts=shared)
    assert find_experts(whole).holders == frozenset()  # nothing has the name of a router


def test_modules_in_a_list_that_nothing_chooses_from_are_no_experts() -> None:
    whole = nn.ModuleDict({"branches": nn.ModuleList(mlp() for _ in range(3)), "out": nn.Linear(WIDTH, WIDTH)})
    assert find_experts(whole).holders == frozenset()
    assert not any(own.routed for own in find_prunables(whole).values())


def test_a_router_without_visible_experts_stays_dense() -> None:
    whole = nn.ModuleDict({"router_gate": nn.Linear(WIDTH, 6), "up": nn.Linear(WIDTH, 6)})
    assert list(find_prunables(whole)) == ["up"]


def test_qwen3_next_at_its_real_size() -> None:
    """512 experts; key, value and the shared expert have 512 rows, too."""
    config = transformers.Qwen3NextConfig(
        num_hidden_layers=4,
        num_key_value_heads=2,
        head_dim=256,
        num_experts=512,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    blocks = find_blocks(model)
    last = blocks[3]
    linears = [name for name, module in last.module.named_modules() if isinstance(module, nn.Linear)]
    assert [name for name in linears if f"{last.name}.{name}" not in last.prunables] == ["mlp.shared_expert_gate"]
    assert left_dense(blocks, {name for block in blocks for name in block.prunables}) == {
        "linear_attn.conv1d": 3 * 8192 * 4,
        "mlp.gate": 4 * 512 * 2048,
        "mlp.shared_expert_gate": 4 * 2048,
    }


def test_what_is_skipped_stays_dense_too() -> None:
    config = transformers.MixtralConfig(hidden_size=32, num_hidden_layers=2, num_local_experts=4, intermediate_size=48)
    with torch.device("meta"):
        blocks = find_blocks(AutoModelForCausalLM.from_config(config))
    skipped = ("self_attn.k_proj", "mlp.experts.down_proj.1")
    pruned = {name for block in blocks for name in block.prunables if not name.endswith(skipped)}
    key = blocks[0].prunables["model.layers.0.self_attn.k_proj"].numel
    assert left_dense(blocks, pruned) == {
        "self_attn.k_proj": 2 * key,
        "mlp.experts.down_proj": 2 * 32 * 48,
        "mlp.gate": 2 * 4 * 32,
    }


def test_a_router_chooses_from_the_experts_beside_it_alone() -> None:
    """Attention and dense layers of a block may be lists of modules as well."""
    whole = block(router=mlp(7), experts=nn.ModuleList(mlp(6) for _ in range(EXPERTS)))
    whole["attentions"] = nn.ModuleList(mlp(6) for _ in range(2))
    found = find_experts(whole)
    assert found.holders == {"mlp.experts"}
    assert not any(own.routed for path, own in find_prunables(whole).items() if "attentions" in path)
