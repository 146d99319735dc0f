"""Calls of packed linears: what is made ready once gives the bits of what is made ready anew."""

import copy

import pytest
import torch

from besa.kernels import sparse, sparse_native
from besa.runtime.linear import SparseLinear
from besa.storage.formats import bitmask
from tests.sparse_weights import codes_weight, half_pruned, row_of_x
from tests.unit.test_kernels import compiled
from tests.unit.test_sparse import with_threads

WEIGHTS = {
    "bfloat16": lambda: bitmask.pack(half_pruned(70, 300).bfloat16()),
    "float16": lambda: bitmask.pack(half_pruned(70, 300).half()),
    "float32": lambda: bitmask.pack(half_pruned(70, 300)),
    "int4": lambda: codes_weight(70, 320, 5, 4, False),
    "int8": lambda: codes_weight(70, 320, 1, 8, True),
}


def in_dtype(weight, dtype):
    """A weight of codes with steps in a dtype."""
    return bitmask.Bitmask(**{**vars(weight), "scales_OG": weight.scales_OG.to(dtype)})


@compiled
@pytest.mark.parametrize("path", sparse_native.paths())
@pytest.mark.parametrize("kind", ["bfloat16", "int4", "int8"])
@pytest.mark.parametrize("batch", [1, 3, 9])
def test_a_kernel_widens_and_rounds_as_torch_does(path, kind, batch):
    weight = WEIGHTS[kind]()
    weight = weight if weight.bits is None else in_dtype(weight, torch.bfloat16)
    x_NI = row_of_x(weight, batch).bfloat16()
    y_NO = sparse_native.multiply(x_NI, weight, path)
    assert y_NO.dtype == torch.bfloat16
    assert torch.equal(y_NO, sparse_native.multiply(x_NI.float(), weight, path).bfloat16())


@compiled
@pytest.mark.parametrize("number", [torch.nan, -torch.nan, torch.inf, -torch.inf, 3.4e38, 1e-40, -0.0])
def test_numbers_at_the_ends_are_rounded_as_torch_does(number):
    weight = bitmask.pack(torch.eye(40).bfloat16())
    x_NI = torch.zeros(1, 40).bfloat16()
    x_NI[0, 7] = number
    for path in sparse_native.paths():
        found_NO, wide_NO = (
            sparse_native.multiply(x_NI, weight, path),
            sparse_native.multiply(x_NI.float(), weight, path),
        )
        assert torch.equal(found_NO.isnan(), wide_NO.isnan())
        assert torch.equal(found_NO.nan_to_num(), wide_NO.bfloat16().nan_to_num())


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3,), (2, 2), (), (0,)])
def test_a_linear_gives_the_bits_of_the_product(kind, shape):
    weight = WEIGHTS[kind]()
    linear, x_NI = SparseLinear(weight), row_of_x(weight, 12)
    count = torch.Size(shape).numel()
    for first in (0, 5):  # the second time, all is ready
        rows_NI = x_NI[first : first + count]
        y_NO = linear(rows_NI.view(*shape, weight.shape[1]))
        assert y_NO.shape == (*shape, weight.shape[0])
        assert torch.equal(y_NO.view(-1, weight.shape[0]), sparse.multiplied(rows_NI, weight))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_strided_rows_and_other_threads_change_no_bit(kind):
    weight = WEIGHTS[kind]()
    linear, x_NI = SparseLinear(weight), row_of_x(weight, 2)
    y_NO = linear(x_NI[:1])
    assert torch.equal(linear(x_NI.T.contiguous().T[:1]), y_NO)
    for threads in (2, 1):
        assert torch.equal(with_threads(threads, linear, x_NI[:1]), y_NO)


def test_another_weight_is_seen_however_it_comes():
    first, second = (bitmask.pack(sign * half_pruned(20, 100)) for sign in (1, -1))  # of one size
    x_NI = row_of_x(first, 1)
    of_first, of_second = sparse.multiplied(x_NI, first), sparse.multiplied(x_NI, second)
    assert not torch.equal(of_first, of_second)
    linear = SparseLinear(first)
    assert torch.equal(linear(x_NI), of_first)
    copied = copy.deepcopy(linear)
    linear.keep(second)
    assert torch.equal(linear(x_NI), of_second)
    assert torch.equal(copied(x_NI), of_first)
    copied.load_state_dict(SparseLinear(second).state_dict(), assign=True)
    assert torch.equal(copied(x_NI), of_second)
    for name, tensor in SparseLinear(first).state_dict().items():
        setattr(copied, name, tensor)
    assert torch.equal(copied(x_NI), of_first)
