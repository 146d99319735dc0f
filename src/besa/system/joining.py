"""Joining the ranks that torchrun has started: one process for each device, on one machine or several."""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from besa.errors import BesaError, ToldError
from besa.system import ranks, watching
from besa.system.processes import launched
from besa.system.watching import Member, Watch
from besa.version import __version__

COMING = 60.0  # seconds within which all ranks have come
PAUSE = 0.1  # seconds between two looks for the others
FOREVER = timedelta(days=100)  # no timeout of torch's own: some phases are long, and the watch sees who is lost
_times = itertools.count()  # that this process has joined others; the store may be the same


@dataclass(frozen=True)
class Launch:
    """What a launcher such as torchrun says in its variables.

    Attributes:
        number: of this rank.
        count: of all ranks.
        place: of this rank among those on its machine.
        host: of the store in which the ranks meet.
        port: of the store.
        kept: the launcher keeps the store; else rank 0 does.
    """

    number: int
    count: int
    place: int
    host: str
    port: int
    kept: bool

    @classmethod
    def read(cls) -> Launch:
        """What the variables say.

        Raises:
            BesaError: one is missing, or is no such number.
        """
        count = _number("WORLD_SIZE", 1)
        number = _number("RANK", 0, count - 1)
        place = _number("LOCAL_RANK", 0, count - 1)
        port = _number("MASTER_PORT", 1, 65535)
        kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(number, count, place, _variable("MASTER_ADDR"), port, kept)

    @property
    def address(self) -> str:
        """Address of the store, as host:port."""
        return f"{self.host}:{self.port}"

    @property
    def has_store(self) -> bool:
        """Whether this process keeps the store."""
        return self.number == 0 and not self.kept


@contextmanager
def joined(command: Sequence[str] = (), last_words: Callable[[str, bool], None] | None = None) -> Iterator[None]:
    """While open, this process works with the others that were launched with it; alone if there are none.

    A program that calls besa from Python does so in here, on all ranks alike, and is started by torchrun. When a rank
    is lost, or ends by an error, the processes of all ranks end.

    Args:
        command: what the user typed, which must be the same on all ranks.
        last_words: is called before this process ends for the sake of another rank, with a sentence that says why, and
            whether this rank is the one to show it; by default it is written to standard error.

    Raises:
        BesaError: a variable of the launcher is missing, the others do not come, or they run something else. An error
            of all ranks is a `ToldError` on all but one.
    """
    if not launched():
        yield
        return
    launch = Launch.read()
    cuda = torch.cuda.is_available()
    if cuda and launch.place < torch.cuda.device_count():
        torch.cuda.set_device(launch.place)
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # it would abort before the watch can say why
    prefix, store = f"besa/{next(_times)}", _store(launch)
    entries = _meet(PrefixStore(prefix, store), launch, command)
    members = [Member(**entry["member"]) for entry in entries]
    here = sum(member.machine == members[launch.number].machine for member in members)
    watch = Watch(
        PrefixStore(prefix, store.clone()),
        members,
        launch.number,
        launch.address,
        launch.has_store,
        last_words or _write,
    )
    watch.start()
    try:
        _check_alike(entries)
        with ranks.together(launch.number, launch.count, here, launch.place, watch.explain):
            with ranks.with_others():
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if cuda else "gloo",
                    store=PrefixStore(f"{prefix}/group", store),
                    rank=launch.number,
                    world_size=launch.count,
                    timeout=FOREVER,
                )
            yield
            ranks.wait()
    except BaseException as error:
        watch.leave(error)
        raise
    watch.finish()
    dist.destroy_process_group()


@cache
def _store(launch: Launch) -> Any:
    """The store in which the ranks meet.

    Raises:
        BesaError: it cannot be reached, or not be made.
    """
    if not launch.has_store:
        _reach(launch)
    try:
        store = TCPStore(
            launch.host,
            launch.port,
            launch.count,
            launch.has_store,
            timedelta(seconds=COMING),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise _once(None, launch, f"Rank {launch.number} cannot meet others at {launch.address}: {reason}.") from error
    store.set_timeout(FOREVER)
    return store


def _reach(launch: Launch) -> None:
    """Wait until somebody answers at the address of the store.

    Raises:
        BesaError: nobody does.
    """
    end = time.monotonic() + COMING
    while True:
        try:
            socket.create_connection((launch.host, launch.port), COMING).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise _once(
                    None,
                    launch,
                    f"Rank {launch.number} on {socket.gethostname()} has not reached {launch.address} within "
                    f"{COMING:.0f} s ({error.strerror or error}): check --master-addr, --master-port and the network.",
                ) from None
        time.sleep(PAUSE)


def _meet(store: Store, launch: Launch, command: Sequence[str]) -> list[dict[str, Any]]:
    """Show this rank to the others, and wait for them; returns what each shows, in their order.

    Raises:
        BesaError: some have not come.
    """
    member = Member.this(launch.number)
    entry = {"member": asdict(member), "version": __version__, "command": list(command)}
    keys = [f"rank/{number}" for number in range(launch.count)]
    end = time.monotonic() + COMING
    try:
        watching.begin(store, member)
        store.set(keys[launch.number], json.dumps(entry))
        while not store.check(keys):
            if time.monotonic() > end:
                missing = [str(number) for number, key in enumerate(keys) if not store.check([key])]
                raise _once(store, launch, _absent(missing, launch))
            time.sleep(PAUSE)
        return [json.loads(answer) for answer in store.multi_get(keys)]
    except RuntimeError:  # torch's, of the store
        sentence = f"{launch.address}, where the ranks meet, has gone: look for the error of rank 0."
        raise _once(None, launch, sentence) from None


def _absent(missing: Sequence[str], launch: Launch) -> str:
    """The sentence on ranks that have not come."""
    many = len(missing) > 1
    who = f"Ranks {', '.join(missing)}" if many else f"Rank {missing[0]}"
    have, was, reaches = ("have", "they were", "reach") if many else ("has", "it was", "reaches")
    return (
        f"{who} of {launch.count} {have} not come within {COMING:.0f} s: see whether {was} started, and {reaches} "
        f"{launch.address}."
    )


def _check_alike(entries: Sequence[dict[str, Any]]) -> None:
    """Check that all ranks run the same.

    Raises:
        BesaError: two do not.
    """
    for number, entry in enumerate(entries):
        for what in ("version", "command"):
            first, other = entries[0][what], entry[what]
            if first != other:
                first, other = (" ".join(each) if what == "command" else each for each in (first, other))
                raise BesaError(f"Ranks 0 and {number} have different {what}s: {first}, and {other}: start all alike.")


def _once(store: Store | None, launch: Launch, sentence: str) -> BesaError:
    """The error of several ranks that have not joined: a `ToldError` on all but one, or one of each machine."""
    turn = launch.place + 1
    if store is not None:
        turn = watching.within(watching.ANSWER, lambda: store.add(watching.TOLD, 1), turn)
    if turn > 1 or launch.has_store:
        time.sleep(watching.GRACE)  # when one ends, torchrun ends the others; when its keeper ends, so does the store
    if turn == 1:
        return BesaError(sentence)
    return ToldError(sentence)


def _variable(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise BesaError(f"WORLD_SIZE is set, but {name} is not: start several ranks by torchrun, which sets both.")
    return value


def _number(name: str, least: int, most: int | None = None) -> int:
    value = _variable(name)
    if not value.isdecimal() or int(value) < least or (most is not None and int(value) > most):
        up = f" up to {most}" if most is not None else ""
        raise BesaError(f"{name} is {value}, not a number from {least}{up}: start ranks by torchrun, which sets it.")
    return int(value)


def _write(sentence: str, show: bool) -> None:
    if show:
        print(f"besa: {sentence}", file=sys.stderr, flush=True)
