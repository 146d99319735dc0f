"""Which rank is lost, by what ranks tell each other, and who shows the sentence that says so."""

import os
import threading

import pytest
from torch.distributed import HashStore

from besa.errors import BesaError, ToldError
from besa.system import processes, watching
from besa.system.watching import AGAIN, Judge, Member, State, Verdict, Watch, begin, within

STILL = 30.0
MEMBERS = [Member(number, f"node{number // 2}", f"machine {number // 2}", 100 + number, "9") for number in range(4)]


@pytest.fixture
def judge():
    return Judge(MEMBERS, 0, "node0:29500", STILL, 0.0)


def states(*beats):
    return [State(beats=number) for number in beats]


def lost(rank, text):
    return Verdict(2, f"Rank {rank} (process {100 + rank} on node{rank // 2}) {text}: {AGAIN}.", rank)


def test_ranks_that_move_are_not_lost(judge):
    for second in range(0, 300, 2):
        assert judge.verdict(states(second, second, second, second), [], second) is None


@pytest.mark.parametrize(("rank", "where"), [(1, ""), (3, ", or cannot be reached")])
def test_a_rank_that_no_longer_moves_is_lost_after_its_time(judge, rank, where):
    for second in range(0, 300, 2):
        beats = [second] * 4
        beats[rank] = min(second, 100)
        found = judge.verdict(states(*beats), [], second)
        if found:
            break
    assert second == 132
    assert found == lost(rank, f"has not moved for 30 s{where}")


def test_this_rank_is_for_others_to_judge(judge):
    for second in range(0, 300, 2):
        assert judge.verdict(states(0, second, second, second), [], second) is None


def test_a_rank_without_a_process_is_lost_at_once(judge):
    assert judge.verdict(states(1, 1, 1, 1), [], 2.0) is None
    assert judge.verdict(states(1, 1, 1, 1), [1], 4.0) == lost(1, "has died")
    assert judge.verdict(None, [1], 4.0) == lost(1, "has died")  # the store may have been its


def test_a_rank_that_is_done_may_go(judge):
    for second in range(0, 300, 2):
        told = states(second, 7, second, second)
        told[1].done = True
        assert judge.verdict(told, [1], second) is None


def test_a_store_that_does_not_answer_is_named(judge):
    for second in range(0, 300, 2):
        found = judge.verdict(states(*[second] * 4) if second <= 50 else None, [], second)
        if found:
            break
    assert second == 82
    assert found == Verdict(2, f"node0:29500, where ranks meet, cannot be reached: {AGAIN}.")


def test_who_was_stopped_itself_does_not_judge_by_old_news(judge):
    assert judge.verdict(states(1, 1, 1, 1), [], 2.0) is None
    assert judge.verdict(states(1, 1, 1, 1), [], 3600.0) is None
    for second in range(3602, 3630, 2):
        assert judge.verdict(states(2, 2, 2, 1), [], second) is None
    assert judge.verdict(states(2, 2, 2, 1), [], 3631.0) == lost(3, "has not moved for 30 s, or cannot be reached")


def test_sigterm_to_all_is_no_loss(judge):
    told = states(1, 1, 1, 1)
    for rank in (0, 1, 3):
        told[rank].terminated = True
    assert judge.verdict(told, [], 2.0) is None
    assert judge.verdict(told, [1], 2.0) == lost(1, "has died")  # as torchrun sends it to all after that
    told[2].terminated = True
    assert judge.verdict(told, [], 4.0) == Verdict(143, f"All ranks were ended by SIGTERM: {AGAIN}.")


@pytest.fixture
def watches(monkeypatch):
    """Of three ranks with one store, of which all but the second, which has died, are this process."""
    monkeypatch.setattr(watching, "TURN", 0.5)
    monkeypatch.setattr(watching, "GRACE", 0.1)
    monkeypatch.setattr(watching, "BEAT", 0.1)
    store, pid = HashStore(), os.getpid()
    since = [processes.started(pid), "long ago", processes.started(pid)]
    members = [Member(number, "here", processes.machine(), pid, since[number]) for number in range(3)]
    for member in members:
        begin(store, member)
    return [Watch(store, members, number, "here:1", number == 0, lambda *_: None) for number in range(3)]


def outcomes(watches, errors):
    """What each rank leaves with."""
    found = {}

    def leave(rank):
        try:
            watches[rank].leave(errors[rank])
            found[rank] = errors[rank]
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=leave, args=[rank]) for rank in errors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_an_error_of_all_ranks_is_shown_by_the_first(watches):
    errors = {rank: BesaError("There is no such recipe.") for rank in range(3)}
    found = outcomes(watches, errors)
    assert found[0] is errors[0]
    assert all(isinstance(found[rank], ToldError) for rank in (1, 2))


def test_an_error_of_one_rank_that_no_other_shows_is_shown_by_itself(watches):
    found = outcomes(watches, {2: BesaError("The disk is full.")})
    assert type(found[2]) is BesaError
    assert str(found[2]) == "Rank 2 on here: The disk is full."


def test_the_first_reason_to_end_is_that_of_all(watches):
    dead = Verdict(2, "Rank 1 has died.", 1)
    assert watches[2]._agreed(dead) == dead
    assert watches[0]._agreed(Verdict(2, "Rank 2 has died.", 2)) == dead
    found = outcomes(watches, {0: BesaError("The disk is full."), 2: BesaError("The disk is full.")})
    assert str(found[0]) == str(found[2]) == "Rank 1 has died."
    assert isinstance(found[2], ToldError)
    assert not isinstance(found[0], ToldError)


def test_a_rank_whose_words_nobody_reads_ends_all_the_same(watches, monkeypatch):
    def broken(sentence, shown):
        raise BrokenPipeError(sentence)

    def end(code):
        raise SystemExit(code)

    watches[2]._last_words = broken
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit) as ended:
        watches[2]._follow(Verdict(2, "Rank 1 has died.", 1))
    assert ended.value.code == 2


def test_a_store_without_an_answer_is_not_waited_for():
    never = threading.Event()

    def gone():
        raise RuntimeError("Connection reset by peer")

    assert within(0.05, never.wait, "nothing") == "nothing"
    assert within(5.0, gone, "nothing") == "nothing"
    assert within(5.0, lambda: 7, "nothing") == 7
    never.set()
