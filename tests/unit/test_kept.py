"""The kept weights of a matrix as a vector: every kernel against indexing by the mask, and the gradient."""

import math

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from besa.kernels import native, reference
from besa.models.kept import kept_of, spread

pytest.importorskip("triton")
from besa.kernels.gpu import masks as gpu_masks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = [0.0, -0.0, 1e-45, 1.0, -2.0, math.inf, math.nan]  # of which the first two are pruned
NUMBERS = [0.0, -0.0, 1.0, 1.00390625, 1.0117188, -3e-8, 3e38, 3.4e38, math.inf, -math.inf, math.nan]


@st.composite
def pruned(draw):
    """A weight, another matrix, and as many numbers as the weight has kept ones."""
    shape = draw(st.tuples(st.integers(1, 4), st.sampled_from([1, 7, 63, 64, 65, 130])))
    w_OI, x_OI = (
        torch.from_numpy(draw(arrays.arrays(np.float32, shape, elements=st.sampled_from(some))))
        for some in (WEIGHTS, NUMBERS)
    )
    w_OI[draw(st.integers(0, shape[0] - 1))] *= draw(st.sampled_from([0, 1]))  # a row may have nothing left, but NaN
    return w_OI, x_OI


def kernels(dtype):
    """The ways to compute: plain torch, Triton interpreted, and C++ for each instruction set."""
    ways = [(reference.spread, reference.gathered), (gpu_masks.spread, gpu_masks.gathered)]
    if dtype in native.NUMBERS:
        for path in native.paths():
            ways.append(
                (
                    lambda *tensors, path=path: native.spread(*tensors, path=path),
                    lambda *tensors, path=path: native.gathered(*tensors, path=path),
                )
            )
    return ways


def same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@given(pruned())
@settings(deadline=None, max_examples=15)
def test_every_kernel_does_what_indexing_does(dtype, case):
    w_OI, x_OI = (tensor.to(dtype) for tensor in case)
    kept_K = case[1][w_OI != 0]
    expected_OI = torch.zeros_like(w_OI)
    expected_OI[w_OI != 0] = kept_K.to(dtype)
    for spread_by, gathered_by in kernels(dtype):
        out_OI, out_K = torch.full_like(w_OI, 7), torch.full_like(kept_K, 7)
        truncates = spread_by is gpu_masks.spread  # Triton's interpreter does, where a GPU rounds
        spread_by(w_OI, kept_K.to(dtype).float() if truncates else kept_K, out_OI)
        same(out_OI, expected_OI)
        gathered_by(w_OI, x_OI, out_K)
        same(out_K, x_OI[w_OI != 0].float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_vector_learns_what_a_masked_matrix_learns(dtype, transposed):
    torch.manual_seed(0)
    w_OI = torch.randn(5, 40).to(dtype) * (torch.rand(5, 40) < 0.5)
    w_OI = w_OI.T if transposed else w_OI
    given_OI = torch.randn(w_OI.shape).to(dtype)
    kept_K = kept_of(w_OI)
    assert torch.equal(kept_K, w_OI[w_OI != 0].float())
    same_OI = spread(kept_K.requires_grad_(), w_OI)
    assert torch.equal(same_OI, w_OI)
    same_OI.backward(given_OI)
    assert torch.equal(kept_K.grad, given_OI[w_OI != 0].float())
    assert torch.equal(kept_of(w_OI, given_OI, len(kept_K)), kept_K.grad)


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_nothing_and_all_kept(kept):
    w_OI = torch.full((3, 70), kept)
    assert torch.equal(spread(kept_of(w_OI), w_OI), w_OI)
    assert len(kept_of(w_OI)) == int(kept) * 210


def test_several_threads_do_the_same():
    torch.manual_seed(0)
    w_OI = torch.randn(301, 577) * (torch.rand(301, 577) < 0.3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert torch.equal(spread(kept_of(w_OI), w_OI), w_OI)
    finally:
        torch.set_num_threads(threads)
