"""Learning takes the same steps whatever the size of its gradients: in wide blocks, and with a loss of any scale."""

import pytest
import torch
from torch import Tensor, nn

from besa.counting.budget import Budget
from besa.counting.masks import rank
from besa.methods.allocation import Besa, BlockProblem, RankedLinear
from besa.methods.allocation.changing import ChangingLinears
from besa.models.blocks import Block
from besa.models.prunable import find_prunables
from besa.system.ranks import Share

ROWS, COLUMNS, SEQUENCES, TOKENS = 64, 32, 4, 24
RECIPE = Besa(steps=24, tolerance=0, crop=1, autocast=False, plain=0.5)


class Wide(nn.Module):
    """A block of one linear, whose outputs are the block's."""

    def __init__(self, w_OI: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(*w_OI.T.shape, bias=False)
        self.linear.weight.data.copy_(w_OI)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def wide(times: int) -> BlockProblem:
    """Half of a linear to go, whose rows and outputs are there so many times."""
    generator = torch.Generator().manual_seed(0)
    w_OI = torch.randn(ROWS, COLUMNS, generator=generator) * torch.logspace(-1, 1, ROWS)[:, None]
    w_OI *= torch.rand(ROWS, COLUMNS, generator=generator) ** torch.linspace(0, 6, ROWS)[:, None]
    module = Wide(w_OI.repeat(times, 1)).requires_grad_(False)
    block = Block(0, "b", module, find_prunables(module), {(1, TOKENS): {}})
    inputs_NTC = torch.randn(SEQUENCES, TOKENS, COLUMNS, generator=generator)
    (name,) = block.prunables
    linear = block.weight(name).clone()
    linears = {name: RankedLinear(linear, linear.abs(), rank(linear.abs(), linear))}
    budget = Budget((name,), linear.numel(), linear.numel() // 2)
    return BlockProblem(block, linears, inputs_NTC, module(inputs_NTC), [budget], 0, Share.whole(SEQUENCES))


def learned(problem: BlockProblem, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The learned rate of each row."""
    found = []
    row_rates = ChangingLinears.row_rates

    def watched(self: ChangingLinears) -> dict[str, Tensor]:
        found.append(row_rates(self))
        return found[-1]

    with monkeypatch.context() as patched:
        patched.setattr(ChangingLinears, "row_rates", watched)
        RECIPE.allocate(problem)
    ((rates_O,),) = (tuple(rates.values()) for rates in found)
    return rates_O


@pytest.mark.parametrize("rows", [576, 2048, 8192])
def test_the_steps_of_a_wider_block_are_the_same(monkeypatch, rows):
    narrow_O = learned(wide(1), monkeypatch)
    assert narrow_O.std() > 0.1
    wide_PO = learned(wide(rows // ROWS), monkeypatch).reshape(-1, ROWS)
    assert (wide_PO - narrow_O).abs().max() < 1e-4


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_loss_does_not_matter(monkeypatch, scale):
    problem = wide(1)
    before_O = learned(problem, monkeypatch)
    error = BlockProblem.error
    monkeypatch.setattr(BlockProblem, "error", lambda *arguments: scale * error(*arguments))
    after_O = learned(problem, monkeypatch)
    assert (after_O - before_O).abs().max() < 1e-4
