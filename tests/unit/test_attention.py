"""Attention of one query to each sequence: against float64, for every instruction set and layout that it takes."""

from inspect import signature

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from besa.kernels import attention
from besa.runtime.attention import attended, restore, speed_up

SHAPES = {  # sequences, heads, heads of keys and values, tokens, numbers of a key, of a value
    "one token": (1, 5, 1, 1, 17, 23),
    "shared by three": (1, 9, 3, 24, 64, 64),
    "shared by seven": (3, 14, 2, 130, 72, 40),
    "wide": (2, 8, 8, 33, 128, 128),
}


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys and values, laid out as a model and its cache do."""
    sequences, heads, shared, tokens, width, value_width = shape
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(sequences, 1, heads, width, generator=generator).to(dtype).transpose(1, 2)
    keys = torch.randn(sequences, tokens + 3, shared, width, generator=generator).to(dtype).transpose(1, 2)[:, :, 3:]
    values = torch.randn(sequences, shared, tokens, value_width, generator=generator).to(dtype)
    return query, keys, values


def exact(query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    wide = [tensor.double().repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (query, keys, values)]
    return scaled_dot_product_attention(*wide, attn_mask=allowed, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("path", attention.paths())
@pytest.mark.parametrize("dtype", attention.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_exact_but_for_its_rounding(shape: str, dtype: torch.dtype, path: str) -> None:
    given = tensors(SHAPES[shape], dtype)
    sequences, _, _, tokens, *_ = SHAPES[shape]
    allowed_N11T = torch.rand(sequences, 1, 1, tokens, generator=torch.Generator().manual_seed(1)) < 0.6
    allowed_N11T[..., -1] = True
    step = 2e-6 if dtype == torch.float32 else 2**-8
    for allowed in (None, allowed_N11T, allowed_N11T[:1]):
        for scale in (0.3, 20.0):  # scores of 20 times as much leave almost all to one token
            assert attention.serves(*given, allowed)
            found = attention.attend(*given, allowed, scale, path)
            assert found.dtype == dtype
            expected = exact(*given, allowed, scale)
            torch.testing.assert_close(found.double(), expected, rtol=step, atol=(2 + 5 * scale) * step)


def test_threads_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors((3, 8, 4, 200, 64, 64), torch.float32)
    found = attention.attend(*given, None, 0.2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(attention, "SHARE", 1)
    assert torch.equal(attention.attend(*given, None, 0.2), found)


@pytest.mark.skipif(not attention.paths(), reason="needs a compiler")
def test_where_no_token_counts_it_is_zero() -> None:
    given = tensors((2, 4, 2, 5, 16, 16), torch.float32)
    allowed_N11T = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    allowed_N11T[1] = False
    found = attention.attend(*given, allowed_N11T, 1.0)
    assert found[1].eq(0).all()
    torch.testing.assert_close(found[0].double(), exact(*given, None, 1.0)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", attention.paths())
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["query", "keys", "values"])
def test_what_is_not_finite_shows_where_torch_shows_it(where: str, number: float, path: str) -> None:
    given = dict(zip(("query", "keys", "values"), tensors((1, 4, 2, 21, 16, 16), torch.bfloat16), strict=True))
    given[where][0, 1, 0, 7] = number
    allowed_N11T = torch.ones(1, 1, 1, 21, dtype=torch.bool)
    for allowed in (None, allowed_N11T):
        expected = exact(*given.values(), allowed, 1.0)
        assert not expected.isfinite().all()
        found = attention.attend(*given.values(), allowed, 1.0, path)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())


def test_what_there_is_no_kernel_for() -> None:
    query, keys, values = tensors((2, 4, 2, 5, 16, 16), torch.float32)
    bias = torch.zeros(2, 1, 1, 5)
    assert not attention.serves(query.half(), keys.half(), values.half(), None)
    assert not attention.serves(query.expand(2, 4, 3, 16), keys, values, None)
    assert not attention.serves(query, keys, values, bias)
    assert not attention.serves(query, keys, values, bias.bool().expand(2, 4, 1, 5))
    assert not attention.serves(query, keys.mT.contiguous().mT, values, None)
    assert not attention.serves(query[:, :3], keys, values, None)
    assert not attention.serves(query, keys[:1], values[:1], None)
    assert not attention.serves(query, keys, values[:, :, :3], None)
    assert not attention.serves(query, keys[..., :8], values, None)
    assert not attention.serves(query.to("meta"), keys.to("meta"), values.to("meta"), None)


@pytest.mark.skipif(not attention.paths(), reason="needs a compiler")
def test_what_goes_the_way_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors((2, 4, 2, 5, 16, 16), torch.float32)
    module, calls = nn.Module(), []
    module.num_key_value_groups = 2
    monkeypatch.setattr(attention, "attend", lambda *given, of=attention.attend: calls.append(given) or of(*given))
    expected, _ = attended(module, *given, None, scaling=0.2)
    assert not calls
    speed_up(module)
    torch.testing.assert_close(attended(module, *given, None, scaling=0.2)[0], expected)
    torch.testing.assert_close(attended(module, *given, None)[0], attended(module, *given, None, scaling=0.25)[0])
    assert len(calls) == 3
    calls.clear()
    named = dict(zip(signature(sdpa_attention_forward).parameters, (module, *given, None), strict=False))
    torch.testing.assert_close(attended(**named, scaling=0.2)[0], expected)
    assert len(calls) == 1
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attended(module, *given, None, scaling=0.2)[0].dtype == torch.bfloat16
    attended(module, given[0].requires_grad_(), *given[1:], None, scaling=0.2)[0].sum().backward()
    assert given[0].grad is not None
    with torch.no_grad():
        attended(module, *given, None, dropout=0.5)
        attended(module, *given, None, position_bias=torch.zeros(1, 4, 1, 5), is_causal=False)
        restore(module)
        attended(module, *given, None, scaling=0.2)
    assert not calls
