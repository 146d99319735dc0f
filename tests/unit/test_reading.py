"""How weights are read: the fastest way is found once and kept, and no way changes a result."""

import itertools
import json
from typing import ClassVar

import pytest
import torch

from besa.kernels import dense, fetching, once, reading, sparse_native
from besa.kernels.reading import USUAL, WAYS, Way, fastest
from besa.storage.formats import bitmask
from tests.sparse_weights import codes_weight, half_pruned, row_of_x
from tests.unit.test_kernels import compiled

TRIED = [path for path in sparse_native.paths() if path in sparse_native.TRIED]


@pytest.fixture
def pieces(monkeypatch, tmp_path):
    """Two pieces of work; a way costs what `costs` says, by the clock that `fastest` looks at."""
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "cache"))
    costs, clock = dict.fromkeys(WAYS, 1.0), [0.0]

    def work(way):
        clock[0] += costs[way]

    monkeypatch.setattr(reading.time, "perf_counter", lambda: clock[0])
    return costs, lambda: [work, work]


def never():
    raise AssertionError("measured again")


def kept(tmp_path):
    (path,) = (tmp_path / "cache" / "kernels").glob("*.json")
    return path


def test_the_fastest_way_is_kept(pieces, tmp_path):
    costs, works = pieces
    costs[Way(2, 3072, 0)] = 0.9
    assert fastest("some work", works) == Way(2, 3072, 0)
    assert fastest("some work", never) == Way(2, 3072, 0)
    assert json.loads(kept(tmp_path).read_text())["found"] == [2, 3072, 0]
    costs[Way(4, 6144, 0)] = 0.5
    assert fastest("other work", works) == Way(4, 6144, 0)


def test_what_may_be_chance_changes_nothing(pieces):
    costs, works = pieces
    costs[Way(2, 3072, 0)] = 0.99
    assert fastest("some work", works) == USUAL


@pytest.mark.parametrize("content", ["", "{", '{"found": [3, 1, 0]}', '{"found": [1, 3072]}', "[2]", "null", "\ud800"])
def test_a_damaged_file_is_measured_again(pieces, tmp_path, content):
    costs, works = pieces
    costs[Way(1, 1536, 1)] = 0.5
    fastest("some work", works)
    kept(tmp_path).write_bytes(content.encode(errors="surrogatepass"))
    assert fastest("some work", works) == Way(1, 1536, 1)
    assert json.loads(kept(tmp_path).read_text())["found"] == [1, 1536, 1]


def test_a_way_is_kept_where_files_have_no_links(pieces, monkeypatch):
    def none(*_):
        raise OSError("not supported")

    costs, works = pieces
    costs[Way(2, 3072, 0)] = 0.5
    monkeypatch.setattr(once.os, "link", none)
    assert fastest("some work", works) == fastest("some work", never) == Way(2, 3072, 0)


def test_another_processor_is_measured_itself(pieces, monkeypatch):
    costs, works = pieces
    costs[Way(1, 1536, 1)] = 0.5
    monkeypatch.setattr(once, "processor", lambda: "one")
    fastest("some work", works)
    monkeypatch.setattr(once, "processor", lambda: "another")
    with pytest.raises(AssertionError, match="measured again"):
        fastest("some work", never)


def test_without_a_cache_it_is_measured_all_the_same(pieces, monkeypatch, tmp_path):
    costs, works = pieces
    costs[Way(1, 1536, 1)] = 0.5
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "file"))
    assert fastest("some work", works) == Way(1, 1536, 1)


@compiled
@pytest.mark.parametrize("path", TRIED)
@pytest.mark.parametrize(
    "kind", ["float32", "bfloat16", "float16", "rows of 8", "128 of 8", "128 of 4", "64 of 4", "16 of 4"]
)
def test_every_way_adds_in_the_same_order(monkeypatch, path, kind):
    """To the bit, whatever is chosen; also with numbers of x that have a third digit, and rows that fill no band."""
    columns = 2176
    if kind.startswith("float") or kind == "bfloat16":
        weight = bitmask.pack(half_pruned(45, columns).to(getattr(torch, kind)))
    else:
        group, bits = kind.split(" of ")
        weight = codes_weight(45, columns, 1 if group == "rows" else columns // int(group), int(bits), False)
    x_NI = row_of_x(weight, 1).float()
    usual_NO = sparse_native.multiply(x_NI, weight, path, USUAL)
    assert usual_NO.any()
    for past, way in itertools.product((False, True), WAYS):
        monkeypatch.setattr(sparse_native, "past_caches", lambda past=past: past)
        assert torch.equal(sparse_native.multiply(x_NI, weight, path, way), usual_NO), (past, way)


@compiled
@pytest.mark.parametrize("kind", bitmask.CHUNKS)
@pytest.mark.parametrize("rows", [2, 3, 4, 17])
def test_several_rows_are_the_same_past_the_caches(monkeypatch, kind, rows):
    if kind.startswith("int"):
        weight = codes_weight(45, 2176, 17, int(kind.removeprefix("int")), False)
    else:
        weight = bitmask.pack(half_pruned(45, 2176).to(getattr(torch, kind)))
    x_NI = row_of_x(weight, rows).float()
    both = []
    for past in (False, True):
        monkeypatch.setattr(sparse_native, "past_caches", lambda past=past: past)
        both.append(sparse_native.multiply(x_NI, weight))
    assert both[0].any() and torch.equal(*both)


@pytest.mark.skipif(not dense.paths(), reason="this processor has no AVX2, or there is no compiler")
@pytest.mark.parametrize("path", dense.paths())
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 17])
def test_dense_products_are_the_same_past_the_caches(monkeypatch, path, rows):
    w_OI = half_pruned(45, 2176).bfloat16()
    x_NI = row_of_x(bitmask.pack(w_OI), rows)
    both = []
    for past in (False, True):
        monkeypatch.setattr(dense, "past_caches", lambda past=past: past)
        both.append(dense.multiply(x_NI, w_OI, path))
    assert both[0].any() and torch.equal(*both)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Kernels that take so many seconds to read a weight into the caches and past them, by a clock of their own."""
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "cache"))
    clock = [0.0]

    class Kernels:
        _name = "kernels"
        seconds: ClassVar = {0: 1.0, 1: 1.0}

        def __getitem__(self, name):
            def multiply(*numbers):
                clock[0] += self.seconds[numbers[6].value]

            return multiply

    kernels = Kernels()
    for name, value in {"SHAPE": (2, 16), "load": lambda source: kernels, "runnable": lambda *_: ["singles"]}.items():
        monkeypatch.setattr(fetching, name, value)
    monkeypatch.setattr(fetching.time, "perf_counter", lambda: clock[0])
    fetching.past_caches.cache_clear()
    yield kernels
    fetching.past_caches.cache_clear()


@pytest.mark.parametrize(("seconds", "past"), [(0.9, True), (1.1, True), (1.3, False), (3.0, False)])
def test_weights_come_past_the_caches_where_that_is_no_slower(monkeypatch, machine, seconds, past):
    machine.seconds = {0: 1.0, 1: seconds}
    assert fetching.past_caches() is past
    monkeypatch.setattr(fetching, "_measured", never)
    fetching.past_caches.cache_clear()
    assert fetching.past_caches() is past


def test_without_kernels_nothing_comes_past_the_caches(monkeypatch, machine):
    monkeypatch.setattr(fetching, "runnable", lambda *_: [])
    monkeypatch.setattr(fetching, "_measured", never)
    assert fetching.past_caches() is False


@compiled
@pytest.mark.skipif(not TRIED, reason="this processor has one way only")
@pytest.mark.parametrize("kind", bitmask.CHUNKS)
def test_large_weights_are_read_in_the_fastest_way(monkeypatch, kind):
    found = []

    def choose(name, works):
        pieces = works()
        for work in pieces:
            work(USUAL)
        found.append((name, pieces))
        return Way(2, 3072, 0)

    for name, value in {"LARGE": 1 << 10, "PIECE": 1 << 10, "PIECES": 2, "fastest": choose}.items():
        monkeypatch.setattr(sparse_native, name, value)
    sparse_native._fastest.cache_clear()
    for weight in sparse_native.samples(kind):
        weight.check(kind)
    x_NI = torch.linspace(-1, 1, 4096)[None]
    y_NO = sparse_native.multiply(x_NI, weight)
    assert torch.equal(y_NO, sparse_native.multiply(x_NI, weight, way=USUAL))
    sparse_native.multiply(x_NI, weight)
    sparse_native.multiply(x_NI.repeat(2, 1), weight)  # not of one row
    ((name, pieces),) = found
    assert kind in name and len(pieces) == 2
    sparse_native._fastest.cache_clear()
