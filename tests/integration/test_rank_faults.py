"""Ranks that die, hang or fail: all end soon, one sentence names the rank, and the run can go on."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from besa.api import compress

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "assets" / "tiny-llama"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
HOST = socket.gethostname()
AGAIN = "start again; `besa prune --resume` goes on from the last finished block."
DIED, STILL = f"has died: {AGAIN}", f"has not moved for 4 s: {AGAIN}"
KEPT = "interrupted; 2 finished blocks are kept in out.partial: go on with --resume."

CASES = {  # the exit code of each rank, who shows a sentence, and which; (2) is the process of rank 2
    "dies/2": ([2, 2, -9], 0, f"Rank 2 (2) {DIED}"),
    "dies/0": ([-9, 2, 2], 1, f"Rank 0 (0) {DIED}"),
    "stops/1": ([2, -9, 2], 0, f"Rank 1 (1) {STILL}"),
    "hangs/0": ([-9, 2, 2], 1, f"Rank 0 (0) {STILL}"),
    "is interrupted/1": ([130, 130, 130], 0, KEPT),
    "is interrupted/-1": ([130, 130, 130], 0, KEPT),
    "is terminated/-1": ([143, 143, 143], 0, f"All ranks were ended by SIGTERM: {AGAIN}"),
    "fails/2": ([2, 2, 2], 0, f"Rank 2 on {HOST}: The disk is full."),
    "fails/0": ([2, 2, 2], 0, "The disk is full."),
    "fails/-1": ([2, 2, 2], 0, "The disk is full."),
    "errs/2": ([2, 2, 1], 0, f"Rank 2 on {HOST}: KeyError, a bug in besa: see its traceback."),
    "stays away/1": ([2, 0, 2], 0, "Rank 1 of 3 has not come within 4 s: see whether it was started, and reaches *."),
    "comes with another command/2": ([2] * 3, 0, "Ranks 0 and 2 have different commands: *, and * --seed 1: start *."),
    "misreads": ([2] * 3, 0, "No such option: --nonsense (Possible options: --seed): see `besa prune --help`."),
}
KEPT_BY = ("dies", "stops", "hangs", "is", "fails", "errs")  # what goes wrong in the third block
OFTEN = ["dies/2", "stops/1", "is interrupted/1", "fails/2", "misreads"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text((TINY / "calibration.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return text


@pytest.fixture(scope="module")
def whole(text: Path) -> bytes:
    """The tensors that one process makes without a fault."""
    return prune(text.with_name("whole"), text)


def prune(out: Path, text: Path) -> bytes:
    compress(str(TINY), "fast", str(text), out=out, samples=6, seqlen=32, batch=2, resume=True)
    return (out / "model.safetensors").read_bytes()


def run(cases: list[str], text: Path, folder: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("ranks_with_faults.py")
    result = subprocess.run(
        [sys.executable, script, TINY, text, folder, "3", *cases],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def check(case: str, found: dict[str, Any], folder: Path, text: Path, whole: bytes) -> None:
    codes, teller, sentence = CASES[case]
    assert found["codes"] == codes
    assert found["seconds"] < 30
    pattern = re.escape(f"besa: {sentence}").replace(r"\*", ".*")
    for rank, pid in enumerate(found["pids"]):
        pattern = pattern.replace(rf"\({rank}\)", rf"\(process {pid} on {re.escape(HOST)}\)")
    for rank, all_printed in enumerate(found["printed"]):
        printed = re.sub(r"^besa: [\d :-]+ block \d/8, .*\n", "", all_printed, flags=re.MULTILINE)
        if rank == teller:
            assert re.fullmatch(pattern, printed.strip()), printed
        elif codes[rank] == 1:
            assert printed.strip().startswith("Traceback")
            assert printed.strip().endswith("KeyError: 'a bug'")
        else:
            assert not printed.strip()
    ends = [log.read_text(encoding="utf-8").splitlines()[-1] for log in (folder / "besa-logs").iterdir()]
    if teller == 0:
        assert any(re.search(pattern.removeprefix("besa:\\ "), end) for end in ends)
    if case.startswith(KEPT_BY):
        blocks = len(list((folder / "out.partial").glob("block-*.json")))
        assert blocks == 2 or (case.startswith("is terminated") and 2 < blocks < 8)  # work goes on for a moment
        assert prune(folder / "out", text) == whole


@pytest.mark.slow
def test_one_sentence_names_the_rank_and_one_process_goes_on(text: Path, whole: bytes, tmp_path: Path) -> None:
    for case, found in run(OFTEN, text, tmp_path).items():
        check(case, found, tmp_path / case.replace("/", "-"), text, whole)


@pytest.mark.slow
def test_whatever_goes_wrong(text: Path, whole: bytes, tmp_path: Path) -> None:
    for case, found in run([case for case in CASES if case not in OFTEN], text, tmp_path).items():
        check(case, found, tmp_path / case.replace("/", "-"), text, whole)


@pytest.mark.slow
def test_torchrun_ends_too_and_no_rank_shows_what_another_shows(text: Path, whole: bytes, tmp_path: Path) -> None:
    """Torchrun ends the others by SIGTERM as soon as one has died."""
    script = Path(__file__).with_name("rank_with_fault.py")
    sizes = ["--samples", "6", "--seqlen", "32", "--batch", "2"]
    command = ["prune", TINY, "out", "--recipe", "fast", "--calibration", text, *sizes]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script, "dies", "1", "3", *command],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=tmp_path,
        timeout=900,
        check=False,
    )
    assert result.returncode == 1
    assert not result.stdout
    said = [line for line in result.stderr.splitlines() if line.startswith("besa: ")]
    told = [line for line in said if " block " not in line]
    assert len(told) == 1, result.stderr
    assert re.fullmatch(rf"besa: Rank 1 \(process \d+ on {re.escape(HOST)}\) {re.escape(DIED)}", told[0])
    assert "exitcode  : 2" in result.stderr  # of rank 0
    assert prune(tmp_path / "out", text) == whole
