"""Which linears of a family's own another layer may stand in for."""

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear

from besa.models.plain_linears import plain_linears


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Adapted(nn.Linear):
    """Computes as torch's until its second product learns."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.low = nn.Parameter(torch.zeros(shape[::-1]))

    def forward(self, x):
        return super().forward(x) + nn.functional.linear(x, self.low)


class Widened(nn.Linear):
    def forward(self, x):
        return super().forward(x).double()


class Paired(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bias", [True, False])
def test_which_linears_are_plain(device, bias):
    with torch.device(device):
        plain = {"torch": nn.Linear(64, 32, bias), "falcon": FalconLinear(64, 32, bias)}
        others = {
            "grouped": DeepseekV4GroupedLinear(64, 32, 2),
            "scaled": Scaled(64, 32, bias),
            "adapted": Adapted(64, 32),
            "widened": Widened(64, 32, bias),
            "paired": Paired(64, 32, bias),
        }
    before = {name: dict(linear.named_parameters()) for name, linear in plain.items()}
    assert plain_linears(nn.ModuleDict(plain | others)) == plain
    for name, tensors in before.items():
        assert all(each is tensors[key] for key, each in plain[name].named_parameters())
