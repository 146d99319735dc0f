"""Tangents through the layers of a packed model that are no packed linears: as through torch's and the family's own."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from besa.runtime import attention, norms
from besa.runtime.dense import DenseLinear


def linears():
    linear = nn.Linear(64, 32, bias=False).requires_grad_(False)
    return DenseLinear(linear), linear


def normed():
    """Two norms, the first with besa's kernel."""
    ours, usual = LlamaRMSNorm(64).requires_grad_(False), LlamaRMSNorm(64).requires_grad_(False)
    norms.speed_up(ours)
    assert "forward" in vars(ours)
    return ours, usual


def attending():
    """Attention of the last token's four heads to all, first of a module that attends by besa's kernel."""
    ours, usual = nn.Module(), nn.Module()
    attention.speed_up(ours)

    def attend(x_TI, module):
        x_NHTD = x_TI.view(1, 3, 4, 16).transpose(1, 2)
        given = (x_NHTD[:, :, -1:], x_NHTD, x_NHTD, None)
        assert attention.attention.serves(*given)
        return attention.attended(module, *given)[0]

    return partial(attend, module=ours), partial(attend, module=usual)


@pytest.mark.skipif(not attention.attention.paths(), reason="needs a compiler")
@pytest.mark.parametrize("layers", [linears, normed, attending])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_tangents(layers, mode):
    x_TI, tangent_TI = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    with mode(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # torch's other ways have no tangents
        (y, dy), (expected, slope) = (
            forward_ad.unpack_dual(layer(forward_ad.make_dual(x_TI, tangent_TI))) for layer in layers()
        )
        torch.testing.assert_close((y, dy), (expected, slope))
        assert slope.abs().max() > 0.1
