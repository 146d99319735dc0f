"""RIA against the sentence that defines it, a weight at a time."""

import math

import pytest
import torch

from besa.methods.importance import RIA
from besa.observing.input_statistics import InputStatistics


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ria(exponent, dtype):
    generator = torch.Generator().manual_seed(0)
    w_OI = torch.randn(4, 6, generator=generator).to(dtype)
    w_OI[2], w_OI[:, 3] = 0, 0
    x_TI = torch.randn(40, 6, generator=generator)
    statistics = InputStatistics.empty(6, gram=False, device=x_TI.device)
    shares_OI = RIA(exponent=exponent).score(w_OI, statistics)
    statistics.add(x_TI)
    score_OI = RIA(exponent=exponent).score(w_OI, statistics)
    assert score_OI.dtype == shares_OI.dtype == torch.float32
    size = [[abs(w) for w in row] for row in w_OI.tolist()]
    for o in range(4):
        for i in range(6):
            row, column = sum(size[o]), sum(size[k][i] for k in range(4))
            share = size[o][i] / row + size[o][i] / column if size[o][i] else 0.0
            norm = math.sqrt(sum(x**2 for x in x_TI[:, i].tolist()))
            assert float(shares_OI[o, i]) == pytest.approx(share, rel=1e-5)
            assert float(score_OI[o, i]) == pytest.approx(share * norm**exponent, rel=1e-5)
