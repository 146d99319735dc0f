"""Copies by streams of their own: nothing is read before it has arrived, and no memory is used again too early.

The streams are pretended: a copy is done only when somebody waits for it, and until then its destination holds NaN.
"""

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import besa
from besa.errors import BesaError
from besa.methods.recipe import Recipe
from besa.models import transfers
from besa.models.activations import MappedStates, Room
from besa.models.blocks import send
from besa.models.transfers import Ahead, Outputs, at_home, fetched
from tests import pretend
from tests.slowly import some_slow

pytestmark = pytest.mark.usefixtures("torchs_own_products")
DEVICE = pretend.DEVICE
N, T, C = 7, 3, 5
RUNS = {
    "pruned": ("besa", ["allocation.steps=3", "allocation.teacher=pruned"], 0),
    "moved": ("besa", ["allocation.steps=3", "finetune.method=adam", "finetune.epochs=1"], 30_000),
    "fast": ("fast", [], 60_000),
}


class Stream:
    """Work that is done in order, once it is waited for. The stream that computes has no such work: it never lags."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.work: deque = deque()
        self.waited_for: list[Stream] = []

    def synchronize(self) -> None:
        while self.work:
            self.work.popleft()()

    def wait_stream(self, other: "Stream") -> None:
        self.waited_for.append(other)
        other.synchronize()

    def record_event(self) -> "Event":
        return Event(self, len(self.work))


class Event:
    def __init__(self, stream: Stream, place: int) -> None:
        self._stream, self._left = stream, place

    def synchronize(self) -> None:
        while self._left and self._stream.work:
            self._stream.work.popleft()()
            self._left -= 1


class Lagging(TorchDispatchMode):
    """Copies that do not block are left to the stream that is open."""

    def __init__(self) -> None:
        super().__init__()
        self.computing = Stream()
        self.used_by: list[tuple[int, Stream]] = []  # tensors whose memory must wait for a stream, by id
        self._of_thread = threading.local()

    @property
    def present(self) -> Stream:
        return getattr(self._of_thread, "present", self.computing)

    @present.setter
    def present(self, stream: Stream) -> None:
        self._of_thread.present = stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if self.present is self.computing or not (kwargs.get("non_blocking") or args[2:] == (True,)):
            return func(*args, **kwargs)
        if name == "aten::copy_":
            raw, source = args[0], args[1].raw
            raw.fill_(torch.nan)
            self.present.work.append(lambda: raw.copy_(source))
            return args[0]
        assert name == "aten::_to_copy"
        out = func(*args, **kwargs)
        raw, source = getattr(out, "raw", out), getattr(args[0], "raw", args[0])
        raw.fill_(torch.nan)
        self.present.work.append(lambda: raw.copy_(source))
        return out


@pytest.fixture(scope="module")
def lagging() -> Iterator[Lagging]:
    mode, module, patch = Lagging(), torch.get_device_module(DEVICE), pytest.MonkeyPatch()

    @contextmanager
    def stream(one: Stream) -> Iterator[None]:
        before, mode.present = mode.present, one
        with mode:
            yield
        mode.present = before

    patch.setattr(module, "Stream", Stream, raising=False)
    patch.setattr(module, "stream", stream, raising=False)
    patch.setattr(module, "current_stream", lambda device: mode.present, raising=False)
    patch.setattr(torch.Tensor, "record_stream", lambda tensor, one: mode.used_by.append((id(tensor), one)))
    patch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    patch.setattr(transfers, "has_streams", lambda device: device.type == pretend.NAME)
    transfers.lane.cache_clear()
    yield mode
    patch.undo()
    transfers.lane.cache_clear()


def test_what_is_fetched_has_arrived_when_it_is_used(lagging):
    x_NTC = torch.randn(N, T, C)
    there = fetched(x_NTC, DEVICE)
    assert torch.equal(there.cpu(), x_NTC)
    assert (id(there), lagging.computing) in lagging.used_by
    assert fetched(there, DEVICE) is there


def test_memory_that_is_not_pinned_is_copied_before_it_may_change(lagging, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
    x_NTC = torch.ones(N, T, C)
    there = fetched(x_NTC, DEVICE)
    x_NTC.zero_()
    assert torch.equal(there.cpu(), torch.ones(N, T, C))


def test_without_a_wait_it_would_not_have_arrived(lagging):
    """The pretended streams would show a mistake."""
    stream = transfers.lane(DEVICE, "states in")
    with torch.get_device_module(DEVICE).stream(stream):
        there = torch.ones(3).to(DEVICE, non_blocking=True)
    assert there.cpu().isnan().all()
    stream.synchronize()
    assert there.cpu().tolist() == [1, 1, 1]


@given(batch=st.integers(1, N + 1), in_file=st.booleans(), in_place=st.booleans(), seed=st.integers(0, 99))
@settings(deadline=None)
def test_a_pass_over_hidden_states_elsewhere_is_that_over_a_tensor(lagging, batch, in_file, in_place, seed):
    x_NTC = torch.randn(N, T, C, generator=torch.Generator().manual_seed(seed))
    room = Room(budget=0 if in_file else 1 << 30)
    source = room.empty(x_NTC.shape, x_NTC.dtype)
    assert isinstance(source, MappedStates) == in_file
    source[:] = x_NTC
    into = source if in_place else room.empty_like(source)
    send(lambda part_NTC: part_NTC * 2 + 1, "it", source, batch, DEVICE, into)
    assert torch.equal(into[:], x_NTC * 2 + 1)
    if not in_place:
        assert torch.equal(source[:], x_NTC)


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_outputs_are_kept_until_their_copy_is_done(lagging, budget):
    into = Room(budget=budget).empty((N, T, C), torch.float32)
    outputs = Outputs(into, DEVICE)
    y_NTC = torch.ones(2, T, C).to(DEVICE)
    stream = transfers.lane(DEVICE, "states out")
    stream.waited_for.clear()
    outputs.put(slice(0, 2), y_NTC)
    assert stream.waited_for == [lagging.computing]
    assert (id(y_NTC), stream) in lagging.used_by
    assert not torch.equal(into[0:2], torch.ones(2, T, C))  # the host has not waited
    outputs.finish()
    assert torch.equal(into[0:2], torch.ones(2, T, C))


def test_outputs_that_are_not_finite_are_refused_at_the_end(lagging):
    x_NTC = torch.ones(N, T, C)
    x_NTC[2, 1, 1] = torch.inf
    with pytest.raises(BesaError, match=r"^The output of it has NaN or infinity"):
        send(lambda part_NTC: part_NTC, "it", x_NTC, 2, DEVICE, None)


def test_weights_come_ahead_and_are_ready_when_they_are_taken(lagging):
    weights = {name: torch.randn(4, 4) for name in "ab"}
    ahead: Ahead[str] = Ahead()
    ahead.begin("block", DEVICE, 128, lambda: {n: w.to(DEVICE, non_blocking=True) for n, w in weights.items()})
    taken = ahead.take("block", DEVICE)
    assert taken is not None
    assert all(torch.equal(taken[name].cpu(), weight) for name, weight in weights.items())
    assert {id(weight) for weight in taken.values()} <= {
        id_ for id_, one in lagging.used_by if one is lagging.computing
    }
    assert ahead.take("block", DEVICE) is None


def test_weights_do_not_come_ahead_where_they_have_no_room(lagging, monkeypatch):
    monkeypatch.setattr(pretend.memory, "free", transfers.NEEDED * 128 - 1)
    ahead: Ahead[str] = Ahead()
    ahead.begin("block", DEVICE, 128, lambda: pytest.fail("was read"))
    assert ahead.take("block", DEVICE) is None


def test_weights_that_found_no_room_are_read_when_they_are_needed(lagging):
    def too_large():
        raise torch.OutOfMemoryError

    ahead: Ahead[str] = Ahead()
    ahead.begin("block", DEVICE, 1, too_large)
    assert ahead.take("block", DEVICE) is None


def test_what_is_wrong_with_weights_shows_when_they_are_taken(lagging):
    def damaged():
        raise BesaError("The file is damaged.")

    ahead: Ahead[str] = Ahead()
    ahead.begin("block", DEVICE, 1, damaged)
    with pytest.raises(BesaError, match=r"^The file is damaged\.$"):
        ahead.take("block", DEVICE)


def test_tensors_come_home_at_once(lagging):
    there = {name: torch.full((3,), place).to(DEVICE) for place, name in enumerate("abc")}
    pretend.reset()
    home = at_home(there | {"d": torch.tensor([9])})
    assert [home[name][0].item() for name in "abcd"] == [0, 1, 2, 9]
    assert (len(pretend.counts.to_host), pretend.counts.syncs.total()) == (3, 0)


@pytest.mark.parametrize(
    ("run", "out"),
    some_slow(
        itertools.product(RUNS, (False, True)),
        {("pruned", False), ("pruned", True), ("moved", False), ("moved", True), ("fast", False)},
    ),
)
def test_a_run_with_all_of_it_is_that_of_the_cpu(lagging, run, out, shallow_llama_folder, tmp_path):
    """Hidden states in files, on the host and on the device; blocks that come ahead, from memory or from the disk."""
    recipe, changes, budget = RUNS[run]
    found = []
    for device in ("cpu", "pretend"):
        result = besa.compress(
            shallow_llama_folder,
            Recipe.load(recipe, None, changes),
            str(shallow_llama_folder / "calibration.txt"),
            samples=4,
            seqlen=32,
            batch=2,
            dtype="bfloat16",
            device=device,
            activation_budget=budget,
            out=tmp_path / device if out else None,
        )
        found.append((result.model.state_dict(), [block.reconstruction_error for block in result.record.blocks]))
    (on_cpu, errors), (there, others) = found
    assert errors == pytest.approx(others)
    assert all(torch.equal(tensor, there[name]) for name, tensor in on_cpu.items())
