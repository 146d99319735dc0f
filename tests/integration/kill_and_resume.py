"""Prunes in child processes that are killed and resumed until one is through; test_resume.py runs it as a script.

The imports are done once and the parent computes nothing, so that a fork is as good as a new process. Kills come after
a time, at one of the moments at which the child touches its files, or at such a moment while it writes a block or puts
the checkpoint together. Runs follow each other until there were enough kills. For each kill, the number of its run and
what OUT.partial held are printed as JSON.

Usage: kill_and_resume.py MODEL TEXT FOLDER SEED KILLS [SETTING…]
"""

import itertools
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.llama import modeling_llama

from besa.api import compress
from besa.methods.recipe import Recipe
from besa.storage import snapshots

IMPORTED = (PreTrainedTokenizerFast, modeling_llama)  # lazily otherwise, in every child
TOUCHES = ("open", "os.rename", "os.remove", "os.mkdir")
PLACES = {  # parts of names, by what is hit
    "touch": ("",),
    "block": (".block-",),
    "state": ("state-",),
    "distilled": ("distilled",),
    "finishing": ("checkpoint", "rest"),
}
WAYS = ["time", "touch", "touch", "time", "block", "finishing", "finishing", "never"]
WAYS_OF_DISTILLING = ["state", "time", "state", "touch", "distilled", "state", "distilled", "finishing", "never"]


def prune(model: str, text: str, out: Path, at: int, places: tuple[str, ...], settings: list[str]) -> None:
    """Prune towards `out`, and die when it touches files of such names for the `at`-th time (0: live)."""
    partial = str(out.with_name(f"{out.name}.partial"))
    touched = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal touched
        if event in TOUCHES and str(arguments[0]).startswith(partial) and not out.exists():
            counts = any(place in str(arguments[0]) for place in places)
            touched += counts
            if counts and touched == at:
                os.kill(os.getpid(), signal.SIGKILL)

    if at:
        sys.addaudithook(watch)
    compress(
        model, Recipe.load("besa", None, settings), text, out=out, samples=8, seqlen=32, dtype="float32", resume=True
    )


def main(model: str, text: str, folder: Path, seed: int, kills: int, settings: list[str]) -> None:
    torch.set_num_threads(1)
    snapshots.EVERY, snapshots.SHARE = 0.0, math.inf  # a state after every step
    draw = random.Random(seed)
    log: list[list[str]] = []
    for run in itertools.count():
        out = folder / f"out{run}"
        partial = out.with_name(f"{out.name}.partial")
        ways = list(WAYS_OF_DISTILLING if settings else WAYS)
        while not out.exists():
            way = ways.pop(0)
            at = draw.randint(1, 2 if way == "block" else 24) if way in PLACES else 0
            child = os.fork()
            if child == 0:
                try:
                    prune(model, text, out, at, PLACES.get(way, ()), settings)
                except BaseException as error:
                    print(repr(error), file=sys.stderr, flush=True)
                    os._exit(1)
                os._exit(0)
            if way == "time":
                time.sleep(draw.uniform(0.2, 1.0))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status) and os.WEXITSTATUS(status):
                sys.exit(f"a child failed after the kills {log}")
            if os.WIFSIGNALED(status):
                log.append([str(run), *sorted(str(path.relative_to(partial)) for path in partial.rglob("*"))])
        if len(log) >= kills:
            break
    print(json.dumps(log))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6:])
