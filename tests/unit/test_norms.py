"""Norms of packed models: which of transformers' and torch's are computed by the kernel, and that it gives the same."""

import copy
import importlib

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from besa.counting import widening
from besa.kernels import norm
from besa.runtime import norms

needs_kernel = pytest.mark.skipif(not norm.paths(), reason="needs a compiler")
FAMILIES = {  # how each of them does it
    ("llama", "LlamaRMSNorm"): norm.Form(0, True),
    ("t5", "T5LayerNorm"): norm.Form(0, True),
    ("olmo2", "Olmo2RMSNorm"): norm.Form(0, False),
    ("gemma2", "Gemma2RMSNorm"): norm.Form(1, False),
    ("olmo", "OlmoLayerNorm"): None,
    ("cohere", "CohereLayerNorm"): None,
}


def made(family: tuple[str, str], width: int, dtype: torch.dtype) -> nn.Module:
    name, kind = family
    module = getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), kind)(width).to(dtype)
    generator = torch.Generator().manual_seed(width)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    return module.requires_grad_(False)


@needs_kernel
@pytest.mark.parametrize("dtype", norm.DTYPES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[1])
def test_families(family: tuple[str, str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, module = made(family, 130, dtype), made(family, 130, dtype)
    norms.speed_up(module)
    form = FAMILIES[family]
    assert ("forward" in vars(module)) == (form is not None)
    if form is None:
        return
    if dtype == torch.bfloat16:
        assert vars(module)["forward"].keywords["form"] == form
    calls = []
    monkeypatch.setattr(norm, "normed", lambda *given, of=norm.normed: calls.append(given) or of(*given))
    for shape in [(1, 1, 130), (2, 3, 130)]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        torch.testing.assert_close(module(x), usual(x), rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=0)
    assert len(calls) == 2
    norms.restore(module)
    assert torch.equal(module(x), usual(x))
    assert len(calls) == 2
    assert "forward" not in vars(module)


@pytest.mark.parametrize("path", norm.paths())
@pytest.mark.parametrize("width", [1, 16, 130, 576])
def test_it_is_exact_but_for_its_rounding(width: int, path: str) -> None:
    generator = torch.Generator().manual_seed(width)
    x_NI, weight_I = torch.randn(3, width, generator=generator), torch.randn(width, generator=generator)
    for more in (0, 1):
        found_NI = norm.normed(x_NI, weight_I, 1e-3, norm.Form(more, False), path)
        square_N1 = x_NI.double().square().mean(dim=1, keepdim=True)
        expected_NI = x_NI.double() / (square_N1 + 1e-3).sqrt() * (weight_I.double() + more)
        torch.testing.assert_close(found_NI.double(), expected_NI, rtol=2e-6, atol=1e-7)


@needs_kernel
def test_what_learns_or_is_large_goes_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    module = made(("llama", "LlamaRMSNorm"), 64, torch.float32)
    norms.speed_up(module)

    def refuse(*given: Tensor) -> Tensor:
        raise AssertionError(given)

    monkeypatch.setattr(norm, "normed", refuse)
    x = torch.randn(2, 64, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    module(torch.randn(norms.FEW // 64 + 1, 64))
    module(hidden_states=torch.randn(1, 64))
    module(torch.randn(2, 128)[:, ::2])
    module.weight = nn.Parameter(torch.ones(128)[::2], requires_grad=False)
    module(torch.randn(2, 64))


@needs_kernel
def test_a_default_device_of_the_program() -> None:
    """It is where new tensors come, those that a norm is tried with excepted."""
    module = made(("llama", "LlamaRMSNorm"), 64, torch.float32)
    with torch.device("meta"):
        norms.speed_up(module)
    assert "forward" in vars(module)


@needs_kernel
def test_modes_that_see_every_operator_but_besas_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation on a processor without units for bfloat16 computes as generation does there."""
    module, x, calls = made(("llama", "LlamaRMSNorm"), 64, torch.bfloat16), torch.randn(1, 64).bfloat16(), []
    norms.speed_up(module)
    monkeypatch.setattr(norm, "normed", lambda *given, of=norm.normed: calls.append(given) or of(*given))
    monkeypatch.setattr(widening, "slow", lambda: frozenset([torch.bfloat16]))
    with widening.widened(torch.bfloat16, x.device):
        module(x)
    assert len(calls) == 1
    with widening.widened(torch.bfloat16, x.device), FlopCounterMode(display=False):
        module(x)
    assert len(calls) == 1


@needs_kernel
def test_copies_have_weights_of_their_own() -> None:
    module = made(("llama", "LlamaRMSNorm"), 64, torch.float32)
    norms.speed_up(module)
    other, x = copy.deepcopy(module), torch.randn(1, 64)
    other.weight.data *= 2
    torch.testing.assert_close(other(x), 2 * module(x))


@needs_kernel
def test_other_modules_stay_as_they_are() -> None:
    modules = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.Linear(8, 8), nn.GroupNorm(2, 8)])
    norms.speed_up(modules)
    assert not any("forward" in vars(module) for module in modules)
