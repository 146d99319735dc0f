"""Hidden states are where there is room for them; in a file they behave as a tensor does."""

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from besa.errors import BesaError
from besa.models import activations
from besa.models.activations import MappedStates, Room
from besa.system.devices import CPU
from tests import pretend

N, T, C = 7, 3, 5


def mapped(x_NTC: torch.Tensor, folder: Path | None = None) -> MappedStates:
    states = Room(budget=0, folder=folder).empty(tuple(x_NTC.shape), x_NTC.dtype)
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


@pytest.mark.parametrize("index", INDICES)
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
    within = Room(budget=size).empty((N, T, C), dtype)
    assert isinstance(within, torch.Tensor)
    above = Room(budget=size - 1).empty((N, T, C), dtype)
    assert isinstance(above, MappedStates)
    for states in (within, above, above[:]):
        assert (states.shape, states.dtype, len(states)) == ((N, T, C), dtype, N)


MEMORIES = (pretend.Pretend, torch.Tensor)  # what hidden states are on the device and on the host


@given(st.integers(0, 200), st.lists(st.tuples(st.integers(1, 80), st.integers(0, 9)), max_size=30))
@settings(deadline=None)
def test_what_is_kept_at_once_is_never_more_than_the_budget(budget, orders):
    """Each order is a size, and which of the hidden states kept before is let go first."""
    room, kept = Room(pretend.DEVICE, budget), []
    for size, gone in orders:
        if gone < len(kept):
            del kept[gone]
        kept.append(room.empty((size, 1, 1), torch.uint8))
        spare = [budget - sum(len(x_NTC) for x_NTC in kept if type(x_NTC) is kind) for kind in MEMORIES]
        assert min(spare) >= 0
        if isinstance(kept[-1], MappedStates):  # in a file only what has room nowhere else
            assert size > max(spare)
        elif type(kept[-1]) is torch.Tensor:
            assert size > spare[0]


def test_by_default_a_quarter_of_a_gpu_and_half_of_the_machine(monkeypatch):
    monkeypatch.setattr(activations, "available_bytes", lambda device: 1000 if device == CPU else 4000)
    room = Room(pretend.DEVICE)
    assert [room.take(900)[0], room.take(101)[0], room.take(100)[0]] == ["device", "host", "device"]
    assert [room.take(399)[0], room.take(1)[0]] == ["host", "file"]
    room = Room()
    assert [room.take(500)[0], room.take(1)[0]] == ["host", "file"]


def test_pinned_memory_counts_as_torch_takes_it(monkeypatch):
    monkeypatch.setattr(activations, "has_streams", lambda device: True)
    room = Room(pretend.DEVICE, 1000)
    assert room.take(1000) == ("device", 1000)
    assert room.take(400) == ("host", 512)
    assert room.take(488) == ("file", 0)
    assert room.take(256) == ("host", 256)


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
        Room(budget=10**9, folder=tmp_path).empty((1000, 1000, 600), torch.float32)
    assert str(caught.value) == (
        "2.4 GB of activations do not fit into the activation budget, nor into a file (No space left on device): "
        "make room, raise --activation-budget or use fewer --samples."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(BesaError, match=r"nor into a file \(No such file or directory\): .*\.$"):
        Room(budget=0, folder=tmp_path / "missing").empty((N, T, C), torch.float32)
