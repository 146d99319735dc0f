"""Prunes by several ranks, of which one fails, and prints what came of it as JSON; test_rank_faults.py runs it.

Usage: ranks_with_faults.py MODEL TEXT FOLDER RANKS CASE...: a case is FAULT/RANK, or "works".
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # as the command line sets it

import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.llama import modeling_llama

from besa import api
from besa.cli import main as besa
from besa.cli.show import pruning as show
from besa.system import joining
from tests import forked
from tests.integration.rank_with_fault import prepare

IMPORTED = (PreTrainedTokenizerFast, modeling_llama, api, show, joining)  # lazily otherwise, in every child
BLOCK = 3


def main(model: str, text: str, folder: Path, count: int, cases: list[str]) -> None:
    torch.set_num_threads(1)
    sizes = ["--samples", "6", "--seqlen", "32", "--batch", "2"]
    command = ["prune", model, "out", "--recipe", "fast", "--calibration", text, *sizes]
    found = {}
    for case in cases:
        fault, _, rank = case.partition("/")
        place = folder / case.replace("/", "-")
        place.mkdir()

        def work(fault: str = fault, rank: str = rank) -> None:
            sys.argv = ["besa", *command, *(["--nonsense"] if fault == "misreads" else [])]
            if fault == "comes with another command" and os.environ["RANK"] == rank:
                sys.argv += ["--seed", "1"]
            if fault == "stays away" and os.environ["RANK"] == rank:
                time.sleep(9)
                os._exit(0)
            prepare(fault, int(rank or 0), BLOCK if rank else 0)
            besa()

        began = time.monotonic()
        pids = forked.launch(count, work, place)
        codes = forked.codes(pids, 40)
        seconds = time.monotonic() - began
        for pid in (pid for pid, code in zip(pids, codes, strict=True) if code is None):
            os.kill(pid, signal.SIGKILL)
        printed = [(place / f"printed-{number}.txt").read_text(encoding="utf-8") for number in range(count)]
        found[case] = {"codes": codes, "printed": printed, "pids": pids, "seconds": seconds}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
