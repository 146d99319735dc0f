"""A thread that works beside another, also when Ctrl-C comes while it starts."""

import threading

import pytest

from besa.storage.beside import Beside


def test_work_is_done_in_turn():
    done, beside = [], Beside()
    futures = [beside.submit(done.append, number) for number in range(5)]
    for future in futures:
        future.result()
    assert done == [0, 1, 2, 3, 4]
    beside.shutdown()


def test_ctrl_c_while_the_thread_starts_leaves_none_that_waits(monkeypatch):
    started, done, start = [], [], threading.Thread.start

    def interrupted(thread):
        start(thread)
        started.append(thread)
        raise KeyboardInterrupt

    beside = Beside()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            beside.submit(done.append, 1)
    (thread,) = started
    thread.join(60)
    assert not thread.is_alive()
    assert done == [1]  # what was begun is done
