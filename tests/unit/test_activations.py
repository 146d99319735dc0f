"""Hidden states in a file behave as a tensor does, and say so when they cannot be had."""

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from besa.errors import BesaError
from besa.models.activations import MappedStates, empty_states

N, T, C = 7, 3, 5


def mapped(x_NTC: torch.Tensor, folder: Path | None = None) -> MappedStates:
    states = empty_states(tuple(x_NTC.shape), x_NTC.dtype, budget=0, folder=folder)
    assert isinstance(states, MappedStates)
    states[:] = x_NTC
    return states


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16])
def x_NTC(request):
    return torch.randn(N, T, C, generator=torch.Generator().manual_seed(0)).to(request.param)


INDICES = [
    slice(None),
    slice(2, 5),
    slice(5, 100),
    slice(0, None, 3),
    slice(6, 7),
    slice(3, 3),
    torch.tensor([4]),
    torch.tensor([6, 0, 6, 2]),
]


@pytest.mark.parametrize("index", INDICES)
def test_reads_are_those_of_a_tensor(x_NTC, index):
    states = mapped(x_NTC)
    assert len(states) == N
    part_NTC = states[index]
    assert part_NTC.dtype == x_NTC.dtype
    assert torch.equal(part_NTC, x_NTC[index])
    part_NTC.fill_(9)  # a copy
    assert torch.equal(states[:], x_NTC)


@pytest.mark.parametrize("index", [*INDICES[:-1], torch.tensor([6, 0, 2])])
def test_writes_are_those_of_a_tensor(x_NTC, index):
    states = mapped(x_NTC)
    new_NTC = torch.randn_like(x_NTC[index])
    states[index] = new_NTC
    x_NTC[index] = new_NTC
    assert torch.equal(states[:], x_NTC)


@given(st.lists(st.tuples(st.integers(0, N), st.integers(0, N), st.integers(1, 4)), max_size=8), st.integers(0, 99))
@settings(deadline=None)
def test_any_writes_one_after_another(writes, seed):
    generator = torch.Generator().manual_seed(seed)
    x_NTC = torch.randn(N, T, C, generator=generator)
    states = mapped(x_NTC)
    for start, stop, step in writes:
        index = slice(start, stop, step)
        new_NTC = torch.randn(x_NTC[index].shape, generator=generator)
        states[index] = new_NTC
        x_NTC[index] = new_NTC
    assert torch.equal(states[:], x_NTC)


def test_values_of_another_dtype_are_converted():
    states = mapped(torch.zeros(2, 1, 2, dtype=torch.float16))
    states[1:] = torch.tensor([[[1.5, -2.0]]])
    assert states[:].tolist() == [[[0, 0]], [[1.5, -2]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_up_to_the_budget_and_a_file_above(dtype):
    size = N * T * C * dtype.itemsize
    within = empty_states((N, T, C), dtype, size)
    assert isinstance(within, torch.Tensor)
    assert (within.shape, within.dtype) == ((N, T, C), dtype)
    above = empty_states((N, T, C), dtype, size - 1)
    assert isinstance(above, MappedStates)
    assert above[:].shape == (N, T, C)
    assert above[:].dtype == dtype


def test_the_file_is_in_the_folder_and_has_no_name(tmp_path, monkeypatch):
    sizes, folders = [], []
    fallocate = os.posix_fallocate

    def watched(file: int, start: int, size: int) -> None:
        sizes.append(size)
        folders.append(os.fstat(file).st_dev)
        fallocate(file, start, size)

    monkeypatch.setattr(os, "posix_fallocate", watched)
    states = mapped(torch.ones(N, T, C), tmp_path)
    assert sizes == [N * T * C * 4]
    assert folders == [tmp_path.stat().st_dev]
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(states[:], torch.ones(N, T, C))


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BesaError) as caught:
        empty_states((1000, 1000, 600), torch.float32, budget=10**9, folder=tmp_path)
    assert str(caught.value) == (
        "2.4 GB of activations do not fit into the activation budget, nor into a file (No space left on device): "
        "make room, raise --activation-budget or use fewer --samples."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(BesaError, match=r"nor into a file \(No such file or directory\): .*\.$"):
        empty_states((N, T, C), torch.float32, budget=0, folder=tmp_path / "missing")
