"""Ranks that watch each other: when one is lost, or ends for a reason of its own, all end, and one says why.

Every rank tells in a store that it moves, and reads what the others tell. The first that sees a reason to end writes a
*verdict* there, which all follow.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, TypeVar

from torch.distributed.distributed_c10d import Store

from besa.errors import BesaError, Interrupted, ToldError
from besa.system import processes, ranks

T = TypeVar("T")
BEAT = 2.0  # seconds between two looks at the others
STILL = 30.0  # seconds without movement after which a rank is lost
ANSWER = 5.0  # seconds in which the store should answer
HURRIED = 0.5  # the same, once it has not
GRACE = 3.0  # seconds in which the main thread may come to the same error as another rank
TURN = 8.0  # seconds that a rank leaves to those that should show a sentence before it does so itself
PATIENCE = {
    signal.SIGTERM: 20.0,  # seconds in which a rank looks for the reason; torchrun kills after 30
    signal.SIGINT: 10.0,  # seconds in which the main thread may end by itself
}
AGAIN = "start again; `besa prune --resume` goes on from the last finished block"
VERDICT, TOLD = "verdict", "told"
INTERRUPTED = 130


@dataclass(frozen=True)
class Member:
    """A rank, and where it runs.

    Attributes:
        host: name of its machine, for people.
        machine: what tells machines apart (`processes.machine`).
        pid: number of its process there.
        since: when that was started.
    """

    number: int
    host: str
    machine: str
    pid: int
    since: str

    @classmethod
    def this(cls, number: int) -> Member:
        """The process that asks, as this rank."""
        pid = os.getpid()
        return cls(number, socket.gethostname(), processes.machine(), pid, processes.started(pid))

    def __str__(self) -> str:
        return f"Rank {self.number} (process {self.pid} on {self.host})"


@dataclass
class State:
    """What a rank tells the others.

    Attributes:
        beats: grows while it moves.
        done: it has done all its work, or has followed a verdict.
        terminated: it has received SIGTERM, as torchrun sends it to all after one has failed.
    """

    beats: int = 0
    done: bool = False
    terminated: bool = False


@dataclass(frozen=True)
class Verdict:
    """Why all ranks end.

    Attributes:
        code: exit code of those that follow it.
        text: one sentence; nothing is shown if it is empty.
        rank: whom it is about; None if it is about all.
        own: the rank has said so itself.
    """

    code: int
    text: str
    rank: int | None = None
    own: bool = False


class Judge:
    """Finds the rank that is lost, from what all tell.

    Args:
        members: all ranks.
        number: of this one.
        address: of the store, for sentences.
        still: seconds without movement after which a rank is lost.
        now: seconds on any clock.
    """

    def __init__(self, members: Sequence[Member], number: int, address: str, still: float, now: float) -> None:
        self._members, self._own = members, members[number]
        self._address, self._still = address, still
        self._beats = [-1] * len(members)
        self._changed = [now] * len(members)
        self._answered = self._looked = now

    def verdict(self, states: Sequence[State] | None, dead: Sequence[int], now: float) -> Verdict | None:
        """The rank that is lost, if one is.

        Args:
            states: of all ranks; None if the store did not answer.
            dead: ranks on this machine that had no process before `states` was asked for.
            now: seconds on the clock.
        """
        if now - self._looked > self._still / 2:  # this process was stopped itself, and perhaps all were
            self._changed = [now] * len(self._members)
            self._answered = now
        self._looked = now
        for rank, state in enumerate(states or ()):
            if state.beats != self._beats[rank]:
                self._beats[rank], self._changed[rank] = state.beats, now
        if states is not None:
            self._answered = now
        working = [member for member in self._members if states is None or not states[member.number].done]
        others = [member for member in working if member is not self._own]
        for member in others:
            if member.number in dead:
                return Verdict(2, f"{member} has died: {AGAIN}.", member.number)
        if now - self._answered > self._still:
            return Verdict(2, f"{self._address}, where ranks meet, cannot be reached: {AGAIN}.")
        for member in others if states is not None else ():
            if now - self._changed[member.number] > self._still:
                unheard = "" if member.machine == self._own.machine else ", or cannot be reached"
                text = f"{member} has not moved for {self._still:.0f} s{unheard}: {AGAIN}."
                return Verdict(2, text, member.number)
        if states is not None and all(states[member.number].terminated for member in working):
            return Verdict(128 + signal.SIGTERM, f"All ranks were ended by SIGTERM: {AGAIN}.")
        return None


class Watch:
    """The thread that watches the others, and how the main thread leaves them.

    Args:
        store: what the ranks tell each other; nobody else uses this connection.
        members: all ranks.
        number: of this one.
        address: of the store.
        keeps: this process keeps the store, so it ends last.
        last_words: is called before the process ends, with a sentence, and whether this rank is the one to show it.
    """

    def __init__(
        self,
        store: Store,
        members: Sequence[Member],
        number: int,
        address: str,
        keeps: bool,
        last_words: Callable[[str, bool], None],
    ) -> None:
        self._store, self._members, self._own = store, members, members[number]
        self._keeps, self._last_words = keeps, last_words
        self._judge = Judge(members, number, address, STILL, time.monotonic())
        self._movement = processes.Movement()
        self._state = State()
        self._patience = ANSWER
        self._ending = threading.Lock()  # held by the thread that ends this process, or its watch
        self._deadlines: dict[int, float] = {}  # by signal
        self._signals, self._wakes = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._before: tuple[Any, int] | None = None

    def start(self) -> None:
        """Begin; SIGTERM no longer ends the process at once, so that somebody can say why it came."""
        if threading.current_thread() is threading.main_thread():
            self._wakes.setblocking(False)
            before = signal.signal(signal.SIGTERM, _go_on)
            self._before = before, signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        self._thread.start()

    def finish(self) -> None:
        """The work is done, and all ranks have come to its end."""
        self._take_over()
        self._wakes.send(b"\0")
        self._thread.join(ANSWER)  # it has told what it had to
        self._depart()
        if self._before is not None:
            handler, descriptor = self._before
            signal.set_wakeup_fd(descriptor)
            signal.signal(signal.SIGTERM, handler)

    def leave(self, error: BaseException) -> None:
        """Tell the others why this rank ends before its work is done, and find out who shows it.

        Raises:
            ToldError: the error is a BesaError, but another rank shows the sentence.
            BesaError: it is one, and this rank shows what another one has met with.
        """
        self._take_over()
        own = _verdict_on(error, self._own.number)
        verdict = self._agreed(own)
        shown = isinstance(error, BesaError) or (verdict.code == INTERRUPTED and self._own.number == 0)
        mine = shown and self._may_tell(self._members[0])
        self._depart(verdict)
        if not isinstance(error, BesaError):
            return
        if not mine:
            raise ToldError(self._in_full(verdict)) from error
        if self._own.number > 0 or verdict.text != own.text:
            raise BesaError(self._in_full(verdict)) from error

    def explain(self, error: RuntimeError) -> None:
        """Wait for the reason why torch.distributed has failed in the main thread; finding it ends the process.

        Raises:
            BesaError: nobody finds it.
        """
        threading.Event().wait(STILL + 2 * (ANSWER + BEAT))
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise BesaError(f"The ranks have lost each other ({reason}): {AGAIN}.") from error

    def _take_over(self) -> None:
        """From here on, the main thread ends this process; unless the watch does so already."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()

    def _watch(self) -> None:
        while not self._ending.locked():
            self._sleep()
            verdict = self._look()
            if verdict is not None:
                self._follow(verdict)

    def _sleep(self) -> None:
        """Until the next look, or a signal."""
        ready, _, _ = select.select([self._signals], [], [], BEAT / 10 if self._deadlines else BEAT)
        now = time.monotonic()
        for number in self._signals.recv(64) if ready else b"":
            if number in PATIENCE:
                self._deadlines.setdefault(number, now + PATIENCE[signal.Signals(number)])
        self._state.terminated = signal.SIGTERM in self._deadlines

    def _look(self) -> Verdict | None:
        own = self._own.machine
        dead = [
            member.number
            for member in self._members
            if member.machine == own and not processes.lives(member.pid, member.since)
        ]
        self._state.beats += ranks.waiting() or self._movement.seen()
        known, states = self._tell()
        now = time.monotonic()
        if signal.SIGINT in self._deadlines:  # the main thread tells the others
            late = now > self._deadlines[signal.SIGINT]
            return Verdict(INTERRUPTED, f"interrupted: {AGAIN}.") if late else None
        if known is not None:
            return known
        found = self._judge.verdict(states, dead, now)
        if found is None and now > self._deadlines.get(signal.SIGTERM, now):
            found = Verdict(128 + signal.SIGTERM, f"{self._own} was ended by SIGTERM: {AGAIN}.", self._own.number)
        return None if found is None else self._agreed(found)

    def _tell(self) -> tuple[Verdict | None, list[State] | None]:
        """Tell the others the state of this rank, and hear the verdict and their states; None is what nobody says."""
        keys = [VERDICT, *(state_key(member.number) for member in self._members)]

        def exchange() -> list[bytes]:
            self._store.set(keys[self._own.number + 1], json.dumps(asdict(self._state)))
            return self._store.multi_get(keys)

        answers = self._asked(exchange, None)
        if answers is None:
            return None, None
        return _read(answers[0]), [State(**json.loads(answer)) for answer in answers[1:]]

    def _asked(self, function: Callable[[], T], otherwise: Any) -> Any:
        """What the store answers; once it has not, it gets less time."""
        answer = within(self._patience, function, None)
        self._patience = ANSWER if answer is not None else HURRIED
        return otherwise if answer is None else answer

    def _follow(self, verdict: Verdict) -> None:
        """End this process, unless its main thread does."""
        if verdict.code == INTERRUPTED and signal.SIGINT not in self._deadlines:
            processes.interrupt()  # also here, the main thread knows best what is kept
            return
        if verdict.own:
            time.sleep(GRACE)
        if not self._ending.acquire(blocking=False):
            return
        survivors = [member for member in self._members if member.number != verdict.rank]
        try:
            if verdict.text:
                self._last_words(self._in_full(verdict), self._may_tell(survivors[0]))
            self._depart(verdict)
        finally:  # also where nobody reads the words any more: the main thread waits for this end
            os._exit(verdict.code)

    def _depart(self, verdict: Verdict | None = None) -> None:
        """Tell the others that this rank has come to an end; the keeper of the store waits for theirs.

        A rank that is lost, but still there, is ended by those on its machine, also after the others: it may be the
        keeper.
        """
        self._state.done = True
        lost = None if verdict is None or verdict.own or verdict.rank is None else self._members[verdict.rank]
        hung = lost is not None and lost.machine == self._own.machine and processes.lives(lost.pid, lost.since)
        end = time.monotonic() + GRACE + TURN + BEAT
        _, states = self._tell()
        while (self._keeps or hung) and states and time.monotonic() < end:
            if all(state.done for member, state in zip(self._members, states, strict=True) if member is not lost):
                break
            time.sleep(BEAT / 10)
            _, states = self._tell()
        if lost is not None and hung:
            processes.end(lost.pid, lost.since)

    def _agreed(self, verdict: Verdict) -> Verdict:
        """The verdict of all: this one, unless another rank was first."""
        text = json.dumps(asdict(verdict))
        answer = self._asked(lambda: self._store.compare_set(VERDICT, "", text), b"")
        return _read(answer) or verdict

    def _may_tell(self, first: Member) -> bool:
        """Whether this rank is the one that shows a sentence: `first`, or another if that does not."""
        here = [member for member in self._members if member.machine == self._own.machine]
        first_here = next(member for member in here if processes.lives(member.pid, member.since))
        end = time.monotonic() + (0 if self._own is first else TURN)
        while time.monotonic() < end and self._asked(lambda: self._store.add(TOLD, 0), None) == 0:
            time.sleep(BEAT / 10)
        turn = self._asked(lambda: self._store.add(TOLD, 1), None)
        if turn is not None:
            return bool(turn == 1)
        time.sleep(2 * BEAT)  # without the store, the first that lives on each machine tells; the others must see it
        return first_here is self._own

    def _in_full(self, verdict: Verdict) -> str:
        """The sentence as another rank shows it."""
        if not verdict.own or verdict.rank is None:
            return verdict.text
        return f"Rank {verdict.rank} on {self._members[verdict.rank].host}: {verdict.text}"


def begin(store: Store, member: Member) -> None:
    """Put into the store what `Watch` reads there first; to be done before the member shows itself to the others."""
    store.compare_set(VERDICT, "", "")
    store.set(state_key(member.number), json.dumps(asdict(State())))


def state_key(number: int) -> str:
    """The key of what a rank tells."""
    return f"state/{number}"


def within(seconds: float, function: Callable[[], T], otherwise: Any) -> Any:
    """What the function returns, or something else if that takes longer, or if the store has gone."""
    results: list[T] = []

    def call() -> None:
        with suppress(RuntimeError):
            results.append(function())

    thread = threading.Thread(target=call, daemon=True)  # a store that does not answer never returns
    thread.start()
    thread.join(seconds)
    return results[0] if results else otherwise


def _verdict_on(error: BaseException, number: int) -> Verdict:
    """What an error of this rank means for the others."""
    if isinstance(error, BesaError):
        return Verdict(2, str(error), number, own=True)
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return Verdict(INTERRUPTED, "interrupted", number, own=True)
    if isinstance(error, SystemExit):
        return Verdict(error.code if isinstance(error.code, int) else 0, "", number, own=True)
    return Verdict(2, f"{type(error).__name__}, a bug in besa: see its traceback.", number, own=True)


def _read(answer: bytes) -> Verdict | None:
    fields: Mapping[str, Any] | None = json.loads(answer) if answer else None
    return None if fields is None else Verdict(**fields)


def _go_on(number: int, frame: FrameType | None) -> None:
    """The watch has seen the signal."""
