"""Products of half precision that are made in float32 where a processor has no units for half precision."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import besa
from besa.counting import widening
from besa.counting.widening import widened

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]


class Seen(TorchDispatchMode):
    """Notes the dtypes in which matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in widening.PRODUCTS or func is torch.ops.aten.addmm_.default:
            self.dtypes.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def without_units(monkeypatch):
    """As on a processor without units for half precision, with panels of which these matrices have several."""
    monkeypatch.setattr(widening, "slow", lambda: frozenset(HALVES))
    monkeypatch.setattr(widening, "PANEL", 24)


def close(actual: Tensor, exact: Tensor, terms: int) -> bool:
    """Whether a result is the exact one, but for float32 sums and one rounding."""
    error = (actual.double() - exact).abs()
    rounding = torch.finfo(actual.dtype).eps / 2 * exact.abs() * 1.01
    return bool((error <= rounding + terms * 2.0**-24 * 40).all())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, b: functional.linear(x, w),
        lambda x, w, b: functional.linear(x, w, b),
        lambda x, w, b: functional.linear(x.view(2, 20, 50), w, b).view(40, 30),
        lambda x, w, b: x @ w.T,
        lambda x, w, b: torch.addmm(b, x, w.T, beta=0.5, alpha=2),
        lambda x, w, b: torch.einsum("ti,oi->to", x, w),
        lambda x, w, b: torch.bmm(x.expand(3, -1, -1), w.T.expand(3, -1, -1))[1],
        lambda x, w, b: torch.baddbmm(b, x.expand(3, -1, -1), w.T.expand(3, -1, -1), beta=0.5, alpha=2)[2],
    ],
    ids=["linear", "bias", "three axes", "matmul", "addmm", "einsum", "bmm", "baddbmm"],
)
def test_products_and_their_gradients_are_those_of_float32_rounded_once(call, dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((40, 50), (30, 50), (30,))]
    given = torch.randn(40, 30).to(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    call(*exact).backward(given.double())
    with Seen() as seen, widened(dtype, CPU):
        y = call(*tensors)
        y.backward(given)
    assert seen.dtypes == {torch.float32}
    assert y.dtype == dtype
    assert close(y, call(*exact).detach(), terms=50)
    for tensor, reference in zip(tensors[:2], exact, strict=False):
        assert tensor.grad is not None
        assert close(tensor.grad, reference.grad, terms=40)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_linear_by_itself(dtype):
    torch.manual_seed(0)
    x, w = torch.randn(40, 50).to(dtype), torch.randn(30, 50).to(dtype)
    with Seen() as seen:
        y = widening.linear(x, w)
    assert seen.dtypes == {torch.float32}
    assert close(y, x.double() @ w.double().T, terms=50)


@pytest.mark.parametrize(("rows", "dtype"), [(widening.FEW - 1, torch.bfloat16), (40, torch.float32)])
def test_few_rows_and_other_dtypes_stay_as_they_are(rows, dtype):
    torch.manual_seed(0)
    x, w = torch.randn(rows, 50).to(dtype), torch.randn(30, 50).to(dtype)
    with Seen() as seen, widened(torch.bfloat16, CPU):
        y = functional.linear(x, w)
    assert seen.dtypes == {dtype}
    assert torch.equal(y, functional.linear(x, w))
    assert torch.equal(y, widening.linear(x, w))


def test_empty_factors():
    x, w = torch.empty(10, 0, dtype=torch.bfloat16), torch.empty(12, 0, dtype=torch.bfloat16)
    with widened(torch.bfloat16, CPU):
        assert torch.equal(functional.linear(x, w), torch.zeros(10, 12, dtype=torch.bfloat16))
        assert functional.linear(x[:0], w).shape == (0, 12)


def test_what_is_not_a_number_shows():
    x, w = torch.ones(10, 50, dtype=torch.bfloat16), torch.ones(12, 50, dtype=torch.bfloat16)
    x[3, 4], x[5, 6] = torch.nan, torch.inf
    with widened(torch.bfloat16, CPU):
        y = functional.linear(x, w)
    assert y[3].isnan().all()
    assert y[5].isinf().all()
    assert y[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_other_devices_and_processors_with_units_need_nothing(monkeypatch, device):
    assert not isinstance(widened(torch.bfloat16, torch.device(device)), TorchDispatchMode)
    monkeypatch.setattr(widening, "slow", frozenset)
    assert not isinstance(widened(torch.bfloat16, CPU), TorchDispatchMode)


def test_a_model_of_float32_has_no_price_to_pay():
    assert isinstance(widened(torch.bfloat16, CPU), TorchDispatchMode)
    assert not isinstance(widened(torch.float32, CPU), TorchDispatchMode)


def test_what_is_slow_is_what_onednn_lacks(monkeypatch):
    monkeypatch.undo()
    halves = torch.bfloat16, torch.float16
    lacks = [not torch.ops.mkldnn._is_mkldnn_bf16_supported(), not torch.ops.mkldnn._is_mkldnn_fp16_supported()]
    assert widening.slow() == {dtype for dtype, missing in zip(halves, lacks, strict=True) if missing}


def test_pruning_and_evaluating_multiply_in_float32(shallow_llama_folder, tmp_path):
    text = shallow_llama_folder / "calibration.txt"
    with Seen() as seen:
        besa.compress(
            shallow_llama_folder,
            besa.Recipe.load("besa", overrides=["allocation.steps=4"]),
            str(text),
            samples=2,
            seqlen=32,
            dtype="bfloat16",
            device="cpu",
            out=tmp_path / "out",
        )
        besa.evaluate(tmp_path / "out", [str(text)], window=32, max_windows=2, device="cpu")
    assert torch.float32 in seen.dtypes
    assert torch.bfloat16 not in seen.dtypes
