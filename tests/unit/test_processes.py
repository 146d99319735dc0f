"""Which processes live, and which move."""

import os
import subprocess
import sys
import threading
import time

import pytest

from besa.system import processes
from besa.system.processes import Movement, end, lives, started


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def work():
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        pass


def moved(work):
    """Whether a thread that watches sees the main one move while that works."""
    found = []

    def watch():
        movement = Movement()
        movement.seen()
        time.sleep(0.4)
        found.append(movement.seen())

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    thread.join()
    return found[0]


def test_a_process_lives_until_it_ends_even_before_its_parent_notices(sleeper):
    since = started(sleeper.pid)
    assert lives(sleeper.pid, since)
    end(sleeper.pid, since)
    time.sleep(0.2)
    assert not lives(sleeper.pid, since)  # a zombie
    sleeper.wait()
    assert not lives(sleeper.pid, since)
    assert not lives(sleeper.pid, "")


def test_another_process_with_the_same_number_is_not_the_one_that_was_meant(sleeper):
    assert not lives(sleeper.pid, "1")
    end(sleeper.pid, "1")
    time.sleep(0.1)
    assert sleeper.poll() is None
    assert lives(os.getpid(), started(os.getpid()))


def test_without_a_proc_file_system_the_number_must_do(sleeper, monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "PROC", tmp_path)
    assert started(sleeper.pid) == ""
    assert lives(sleeper.pid, "")
    assert processes.machine()


def test_sleep_is_no_movement_and_work_is():
    assert not moved(lambda: time.sleep(0.5))
    assert moved(work)


def test_work_of_other_threads_and_of_children_is_movement():
    def in_thread():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    assert moved(in_thread)
    assert moved(lambda: subprocess.run(["sleep", "0.6"], check=True))


def test_work_of_other_threads_is_movement_without_a_proc_file_system_too(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "PROC", tmp_path)
    assert moved(work)
    assert not moved(lambda: time.sleep(0.5))
