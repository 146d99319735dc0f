"""Ranks as forks of a process that has done the imports, because torchrun takes seconds to start each anew."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def launch(count: int, work: Callable[[], None], folder: Path) -> list[int]:
    """Start ranks that do the work in a folder, with rank 0 as keeper of the store; returns their process numbers.

    What a rank prints is in `folder`/`printed-N.txt`.
    """
    port = free_port()
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                variables = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")
                os.chdir(folder)
                printed = os.open(f"printed-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(printed, 1)
                os.dup2(printed, 2)
                work()
                code = 0
            except SystemExit as exit:
                code = int(exit.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def codes(pids: list[int], seconds: float) -> list[int | None]:
    """Their exit codes, negative for signals; None for those that take longer."""
    end, found = time.monotonic() + seconds, dict.fromkeys(pids)
    while None in found.values() and time.monotonic() < end:
        for pid in (pid for pid, code in found.items() if code is None):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                found[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return list(found.values())
