"""Long work where standard error is a file, as under nohup and Slurm: lines that come while it runs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.calling import called

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
TEXT = TINY / "calibration.txt"
SMALL = ["--calibration", TEXT, "--samples", "4", "--seqlen", "32"]
LEARNED = ["--recipe", "besa", "--set", "allocation.steps=6"]  # a block takes long enough to be interrupted
MOMENT = r"besa: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
BLOCK = r"block (\d)/8, model\.layers\.(\d): error (\d\.\d{4}), sparsity (\d\d\.\d\d)%, "
FRESH = re.compile(MOMENT + BLOCK + r"([\d.]+) s(, \d:\d\d:\d\d left)?")
KEPT = re.compile(MOMENT + BLOCK + "taken from the journal(, )?")


def objects(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_speaks_while_it_works_and_so_does_the_one_that_goes_on(tmp_path: Path) -> None:
    out, log, news = tmp_path / "out", tmp_path / "log", tmp_path / "progress.jsonl"
    command = [sys.executable, "-m", "besa", "prune", TINY, out, *LEARNED, *SMALL, "--json-progress", news]
    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=file, env=os.environ)
    while process.poll() is None and log.read_text().count("\n") < 2:  # a line is there as soon as its block is done
        time.sleep(0.05)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    *lines, last = log.read_text().splitlines()
    assert last.startswith("besa: ")
    assert "--resume" in last
    begun = [FRESH.fullmatch(line) for line in lines]
    assert [(line[1], line[2]) for line in begun] == [(str(n + 1), str(n)) for n in range(len(lines))]
    assert all(line[6] for line in begun)  # the time left

    done = called(*command[3:], "--resume")
    assert done.returncode == 0
    resumed = done.stderr.splitlines()
    assert len(resumed) == 8
    kept = [line for line in resumed if KEPT.match(line)]
    assert len(lines) <= len(kept) <= len(lines) + 1  # Ctrl-C may have come between the journal and the line
    for one, other in zip(begun, kept, strict=False):
        assert KEPT.match(other).group(1, 2, 3, 4) == one.group(1, 2, 3, 4)
    fresh = [FRESH.fullmatch(line) for line in resumed[len(kept) :]]
    assert [line[1] for line in fresh] == [str(n) for n in range(len(kept) + 1, 9)]
    assert [line[6] is None for line in fresh] == [False] * (len(fresh) - 1) + [True]

    record = json.loads((out / "besa_run.json").read_text())["blocks"]
    for line, block in zip(resumed, record, strict=True):
        _, _, error, sparsity = (KEPT.match(line) or FRESH.match(line)).group(1, 2, 3, 4)
        assert (error, sparsity) == (f"{block['reconstruction_error']:.4f}", f"{100 * block['sparsity']:.2f}")
    for one, block in zip(fresh, record[len(kept) :], strict=True):
        assert one[5] == f"{block['seconds']:.1f}"

    told = objects(news)
    ends = [one["error"] for one in told if one["event"] == "end"]
    assert [one["event"] for one in told].count("begin") == 2  # the second run was added to the first
    assert ends[0] is not None
    assert "--resume" in ends[0]
    assert ends[1:] == [None]
    second = told[[one["event"] for one in told].index("end") + 1 :]
    blocks = [one for one in second if one["event"] == "block"]
    assert [one["error"] for one in blocks] == [block["reconstruction_error"] for block in record]
    assert [one["seconds"] for one in blocks] == [block["seconds"] for block in record]
    assert [one["restored"] for one in blocks] == [True] * len(kept) + [False] * len(fresh)
    assert blocks[-1]["left"] == 0


def test_lines_of_a_comparison_name_the_run_and_quiet_is_quiet(tmp_path: Path) -> None:
    settings = ["--recipes", "magnitude", "--ppl", TINY / "heldout.txt", "--window", "32", "--max-windows", "2"]
    settings += [*SMALL, "--out", tmp_path / "compare"]
    made = called("compare", TINY, *settings)
    assert made.returncode == 0, made.stderr
    lines = made.stderr.splitlines()
    assert len(lines) == 8
    for n, line in enumerate(lines):
        assert re.match(rf"{MOMENT}magnitude-0.5-seed0: block {n + 1}/8, model\.layers\.{n}: ", line), line
    news = tmp_path / "news"
    made = called("compare", TINY, *settings, "--seeds", "2", "--quiet", "--json-progress", news, "--json", "-")
    assert (made.returncode, made.stderr) == (0, "")
    assert [row["seeds"] for row in json.loads(made.stdout)["rows"]] == [2]
    told = objects(news)
    assert [one["run"] for one in told if one["event"] == "block"] == ["magnitude-0.5-seed1"] * 8
    assert all(one["note"].startswith("magnitude-0.5-seed1: ") for one in told if "note" in one and one["total"] == 8)


def test_what_takes_less_than_a_minute_and_has_no_blocks_says_nothing(tmp_path: Path) -> None:
    made = called("eval", TINY, "--ppl", TINY / "heldout.txt", "--window", "32", "--max-windows", "4")
    assert (made.returncode, made.stderr) == (0, "")
