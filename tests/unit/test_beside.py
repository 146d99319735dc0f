"""Threads that work beside another, besa's own and those that read a model: Ctrl-C while one starts leaves none."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import besa
from besa.storage.beside import Beside


@contextmanager
def ctrl_c_as_a_thread_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[threading.Thread]]:
    """Ctrl-C as soon as a pool starts a thread, so that neither the pool nor Python knows of it; it is listed."""
    started, start = [], threading.Thread.start

    def interrupted(thread):
        start(thread)
        if thread.name.startswith("ThreadPoolExecutor"):
            started.append(thread)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        yield started


def test_work_is_done_in_turn():
    done, beside = [], Beside()
    futures = [beside.submit(done.append, number) for number in range(5)]
    for future in futures:
        future.result()
    assert done == [0, 1, 2, 3, 4]
    beside.shutdown()


def test_ctrl_c_while_the_thread_starts_leaves_none_that_waits(monkeypatch):
    done, beside = [], Beside()
    with ctrl_c_as_a_thread_starts(monkeypatch) as started, pytest.raises(KeyboardInterrupt):
        beside.submit(done.append, 1)
    (thread,) = started
    thread.join(60)
    assert not thread.is_alive()
    assert done == [1]  # what was begun is done


@pytest.mark.parametrize("by_block", [False, True])
def test_ctrl_c_while_a_model_is_read_leaves_none_either(by_block, shallow_llama_folder, tmp_path, monkeypatch):
    """Also while the interruption, which held the pool, is still there."""
    text, out = str(shallow_llama_folder / "calibration.txt"), tmp_path / "out" if by_block else None
    with ctrl_c_as_a_thread_starts(monkeypatch) as started, pytest.raises(KeyboardInterrupt) as held:
        besa.compress(shallow_llama_folder, "magnitude", text, out=out, samples=1, seqlen=8)
    (thread,) = started
    thread.join(10)
    assert not thread.is_alive()
    assert held.value.__traceback__ is not None
