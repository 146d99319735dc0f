"""Commands that write, killed or out of disk at one of the moments at which they touch their files, and run again.

The imports are done once and the parent computes nothing, so that a fork is as good as a new process. Each moment is
tried once: the process dies there, or is told that the disk is full. Whatever stands under the name of the result must
be whole then; a run that nobody stops must give the same as one that was never stopped, and leave nothing else.
Printed, as JSON, for each command: how often a process died, and how often the disk was full.

Usage: kill_and_repeat.py COMMANDS MODEL TEXT FOLDER SEED MOMENTS
"""

import errno
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast
from transformers.models.llama import modeling_llama

import besa
from besa.api import evaluate
from besa.checkpoint.packing import pack, unpack
from besa.checkpoint.shrinking import shrink
from besa.errors import BesaError
from besa.studies.comparing import compare
from besa.studies.workspace import Conditions, Measures, Workspace

IMPORTED = (PreTrainedTokenizerFast, modeling_llama, evaluate)  # lazily otherwise, in every child
TOUCHES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FULL = 3  # exit code of a process that says in a sentence that the disk is full
REFUSED = 2


def sparse_model(dense: Path, out: Path) -> None:
    """Half of the weights and ten channels of each feed-forward are zero."""
    shutil.copytree(dense, out)
    tensors = load_file(dense / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensor.clamp_(min=0)
        if "down_proj" in name:
            tensor[:, :10] = 0
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def compared(model: Path, text: str, out: Path) -> None:
    measures = Measures((text,), window=16, max_windows=2)
    workspace = Workspace(out, Conditions(str(model), text, samples=2, seqlen=16), measures)
    compare(workspace, ["magnitude"], [0.5], 1)


def watched(action: Callable[[Path], object], out: Path, at: int, full: bool, counts: Path) -> None:
    """Act towards `out`; die, or find the disk full, at the `at`-th touch of its files.

    Where it comes to no such touch, it writes how often it could have died, and how often found the disk full.
    """
    places = [str(out), str(out.with_name(f".{out.name}.partial"))]
    touches = {False: 0, True: 0}

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        name = str(arguments[0]) if event in TOUCHES else ""
        if not any(name == place or name.startswith(f"{place}/") for place in places):
            return
        made = event == "os.mkdir" and not Path(name).exists()
        for kind in {False, made or (event == "open" and bool(arguments[2] & WRITING))}:
            touches[kind] += 1
            if kind == full and touches[kind] == at:
                if full:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    action(out)
    found = [touches[False], touches[True]]
    counts.write_text(json.dumps(found))


def started(action: Callable[[], object]) -> int:
    """A child that acts, by its id."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BesaError as refusal:
            print(refusal, file=sys.stderr, flush=True)
            os._exit(FULL if "The disk is full: " in str(refusal) else REFUSED)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def ended(child: int) -> int:
    """Its exit code, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(out: Path) -> dict[str, Any]:
    """What two runs must have in common: all bytes, or of a comparison its files and all numbers but times.

    A comparison that was killed while it evaluated may leave the checkpoint that it evaluated.
    """
    if not (out / "compare.json").exists():
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    found = json.loads((out / "compare.json").read_text())
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in [found["dense"], *found["rows"]]]
    assert not list(out.glob("*.partial"))
    return {"files": sorted(path.name for path in out.iterdir() if path.is_file()), "rows": rows}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def tried(action: Callable[[Path], object], appears: bool, folder: Path, seed: int, moments: int) -> dict[str, int]:
    """Stop a command at some moments.

    Args:
        action: the command, towards a folder.
        appears: whether its folder is not there before it is whole.
        folder: to work in.
        seed: of the moments.
        moments: how many of each kind.
    """
    counts, whole, out = folder / "counts", folder / "whole", folder / "out"
    shutil.rmtree(whole, ignore_errors=True)
    assert ended(started(lambda: watched(action, whole, 0, False, counts))) == 0
    expected, there = content(whole), names(folder)
    stops = {"died": 0, "filled": 0}
    for full, touches in zip((False, True), json.loads(counts.read_text()), strict=True):
        for at in sorted(random.Random(seed).sample(range(1, touches + 1), min(moments, touches))):
            code = ended(started(lambda full=full, at=at: watched(action, out, at, full, counts)))
            assert code == (FULL if full else -signal.SIGKILL), (full, at, code)
            stops["filled" if full else "died"] += 1
            if appears:
                assert not full or names(folder) == there, at
                if out.exists():
                    assert content(out) == expected, (full, at)
                    besa.verify(out)
                    shutil.rmtree(out)
            assert ended(started(lambda: action(out))) == 0, (full, at)
            assert content(out) == expected, (full, at)
            assert names(folder) == there | {"out"}, (full, at)
            shutil.rmtree(out)
    codes = sorted(ended(child) for child in [started(lambda: action(out)) for _ in range(2)])
    assert codes in ([0, 0], [0, REFUSED]), codes  # two at once: both are served, or one is told to wait
    if not appears:
        assert ended(started(lambda: action(out))) == 0
    assert content(out) == expected
    assert names(folder) == there | {"out"}
    shutil.rmtree(out)
    return stops


def main(commands: str, model: Path, text: str, folder: Path, seed: int, moments: int) -> None:
    torch.set_num_threads(1)
    sparse, packed = folder / "sparse", folder / "packed"
    assert ended(started(lambda: (sparse_model(model, sparse), pack(sparse, packed)))) == 0
    actions: dict[str, Callable[[Path], object]] = {
        "pack": lambda out: pack(sparse, out),
        "unpack": lambda out: unpack(packed, out),
        "shrink": lambda out: shrink(sparse, out),
        "compare": lambda out: compared(model, text, out),
    }
    found = {}
    for command in commands.split(","):
        found[command] = tried(actions[command], command != "compare", folder, seed, moments)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6]))
