"""Prunes by one to three ranks, of which one is killed, and goes on with another number of them until all is done.

A rank is killed after a time, in a sum or gathering, or while rank 0 touches its files. Runs follow each other until
there were enough kills. For each kill, how and with how many ranks, and how many blocks were kept, are printed as JSON.

Usage: kill_ranks_and_resume.py MODEL TEXT FOLDER SEED KILLS
"""

import functools
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # as the command line sets it

import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.llama import modeling_llama

from besa import api
from besa.cli import main as besa
from besa.cli.show import pruning as show
from besa.system import joining, ranks
from tests import forked

IMPORTED = (PreTrainedTokenizerFast, modeling_llama, api, show, joining)  # lazily otherwise, in every child
TOUCHES = ("open", "os.rename", "os.remove", "os.mkdir")
WAYS = {"time": 0, "meeting": 200, "touch": 40}  # how a rank is killed: at which of so many moments


def die_at(way: str, at: int, partial: Path) -> None:
    """Kill this process at such a moment."""
    met, seen = ranks.with_others, 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def with_others() -> Iterator[None]:
        count()
        with met():
            yield

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event in TOUCHES and str(arguments[0]).startswith(str(partial)):
            count()

    if way == "meeting":
        ranks.with_others = with_others
    elif way == "touch":
        sys.addaudithook(watch)


def work(command: list[str], victim: int, dying: Callable[[], None]) -> None:
    """Run a command on this rank; the victim dies of it."""
    sys.argv = command
    if int(os.environ["RANK"]) == victim:
        dying()
    besa()


def main(model: str, text: str, folder: Path, seed: int, kills: int) -> None:
    torch.set_num_threads(1)
    draw, log = random.Random(seed), []
    for run in itertools.count():
        out = folder / f"out{run}"
        partial = out.with_name(f"{out.name}.partial")
        sizes = ["--samples", "7", "--seqlen", "32", "--batch", "2", "--dtype", "float32"]
        counts, ways = [1, 2, 3], itertools.cycle([*WAYS, *WAYS, "never"])
        while not out.exists():
            way, count = next(ways), draw.choice(counts)
            counts = [number for number in (1, 2, 3) if number != count]
            victim, at = draw.randrange(count) if way != "touch" else 0, draw.randint(1, WAYS.get(way, 0) or 1)

            command = ["besa", "prune", model, str(out), "--calibration", text, *sizes, "--resume"]
            dying = functools.partial(die_at, way, at, partial)
            pids = forked.launch(count, functools.partial(work, command, victim, dying), folder)
            if way == "time":
                time.sleep(draw.uniform(0.3, 4.0))
                os.kill(pids[victim], signal.SIGKILL)
            codes = forked.codes(pids, 60)
            printed = [(folder / f"printed-{number}.txt").read_text(encoding="utf-8") for number in range(count)]
            story = {"run": run, "way": way, "ranks": count, "victim": victim, "codes": codes}
            if codes[victim] == -signal.SIGKILL:
                named = sum(f"Rank {victim} (process {pids[victim]} on" in words for words in printed)
                alive = [code for rank, code in enumerate(codes) if rank != victim]
                if not out.exists() and (alive != [2] * (count - 1) or named != (count > 1)):
                    sys.exit(f"{story}: {printed}")
                log.append(story | {"blocks": len(list(partial.glob("block-*.json")))})
            elif any(codes):
                sys.exit(f"{story}: {printed}")
        if len(log) >= kills:
            break
    print(json.dumps(log))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
