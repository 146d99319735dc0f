"""Distilling that is stopped, by whatever, and goes on: the result is to the bit that of a run that was not stopped."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import besa
from besa.api.calibrating import Asked
from besa.errors import Interrupted
from besa.methods.distilling.trainer import Trainer
from besa.methods.recipe import Recipe
from besa.record import RunRecord
from besa.storage import snapshots
from besa.storage.snapshots import Snapshots
from tests import pretend
from tests.slowly import some_slow

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "assets" / "tiny-llama"
TEXT = str(TINY / "calibration.txt")
SETTINGS = ["distill={method: kl, learns: both, epochs: 2, rate: 0.003, batch: 4, further: true}"]
SIZES = {"samples": 9, "seqlen": 64, "dtype": "float32"}
STEPS = 2 * 2 * 2  # epochs of both, each of eight sequences in steps of four


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state is kept after every step."""
    monkeypatch.setattr(snapshots, "EVERY", 0.0)
    monkeypatch.setattr(snapshots, "SHARE", math.inf)


class Prune(Protocol):
    """Prune and distil towards `out`; stop as Ctrl-C would when so many reports on distilling have come."""

    def __call__(
        self,
        out: Path,
        stop: int = 0,
        resume: bool = False,
        settings: Sequence[str] = SETTINGS,
        device: str = "cpu",
    ) -> RunRecord: ...


@pytest.fixture(scope="module")
def prune(shallow_llama_folder: Path) -> Prune:
    def pruned(
        out: Path, stop: int = 0, resume: bool = False, settings: Sequence[str] = SETTINGS, device: str = "cpu"
    ) -> RunRecord:
        told = 0

        def progress(done: float, total: float, note: str = "") -> None:
            nonlocal told
            if note.startswith("distilling"):
                assert total == STEPS
                told += 1
                if told == stop:
                    raise KeyboardInterrupt

        recipe, run = Recipe.load("wanda", None, settings), {"device": device, "resume": resume, "progress": progress}
        return besa.compress(shallow_llama_folder, recipe, TEXT, out=out, **SIZES, **run).record

    return pruned


@pytest.fixture(scope="module")
def whole(prune: Prune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    record = prune(out)
    assert record.distilling is not None
    assert len(record.distilling.losses) == 5
    assert record.distilling.losses[-1] < record.distilling.losses[0]
    return out


@pytest.mark.slow
def test_a_checkpoint_has_what_learned_in_memory(shallow_llama_folder: Path, whole: Path) -> None:
    """Linears, norms in the blocks and the final norm, by whichever way the model was read; embeddings stay."""
    model = AutoModelForCausalLM.from_pretrained(shallow_llama_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(shallow_llama_folder)
    record = besa.compress(model, Recipe.load("wanda", None, SETTINGS), TEXT, tokenizer=tokenizer, **SIZES).record
    written, dense = AutoModelForCausalLM.from_pretrained(whole), load_file(shallow_llama_folder / "model.safetensors")
    assert record.distilling.losses == RunRecord.of(whole).distilling.losses
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, written.get_parameter(name)), name
        same = torch.equal(parameter, dense[name]) if name in dense else True
        assert same == ("embed_tokens" in name or "lm_head" in name), name
    besa.verify(whole)


@pytest.mark.parametrize("stop", some_slow([4, 8], {4}))
def test_interrupted_and_gone_on_with(prune: Prune, stop: int, whole: Path, tmp_path: Path) -> None:
    """While norms learn, and while weights learn."""
    out = tmp_path / "out"
    with pytest.raises(Interrupted, match="3 finished blocks are kept"):
        prune(out, stop)
    partial = out.with_name("out.partial")
    assert len(list(partial.glob("state-?.json"))) == 1
    record = prune(out, resume=True)
    assert record.restored_blocks == 3
    assert record.distilling.losses == RunRecord.of(whole).distilling.losses
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not partial.exists()


@pytest.mark.slow
def test_moments_and_their_steps_are_on_the_device_of_the_weights(
    prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused Adam of a GPU takes no others; a run that is resumed has them from the state's file."""
    step, devices = torch.optim.Adam.step, set()

    def watched(optimizer: torch.optim.Adam, *arguments: object) -> object:
        devices.update(
            (parameter.device, tensor.device)
            for parameter, state in optimizer.state.items()
            for tensor in state.values()
        )
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    with pytest.raises(Interrupted):
        prune(tmp_path / "out", 3, device=pretend.NAME)
    devices.clear()
    prune(tmp_path / "out", resume=True, device=pretend.NAME)
    assert {(one.type, other.type) for one, other in devices} == {(pretend.NAME, pretend.NAME)}


@pytest.mark.slow
def test_what_fitted_into_the_minutes_stays(prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is faster when the run goes on."""
    again = [*SETTINGS, "distill.further=false"]
    out, settings = tmp_path / "out", [*again, "distill.minutes=1", "distill.epochs=7"]
    monkeypatch.setattr("besa.methods.distilling.trainer.Trainer._fitting", lambda self, seconds: 2)
    with pytest.raises(Interrupted):
        prune(out, 3, settings=settings)
    monkeypatch.setattr("besa.methods.distilling.trainer.Trainer._fitting", lambda self, seconds: 5)
    record = prune(out, resume=True, settings=settings)
    assert record.distilling.epochs == 2
    assert record.distilling.losses == prune(tmp_path / "whole", settings=again).distilling.losses


def test_seconds_are_those_of_all_processes(prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes 1,000 seconds ahead while a run distils that is stopped then."""
    out, clock = tmp_path / "out", time.perf_counter
    waited = [0.0]
    keep = Snapshots.keep

    def slowly(self: Snapshots, *args: Any) -> bool:
        waited[0] += 1000
        return keep(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: clock() + waited[0])
        patch.setattr(Snapshots, "keep", slowly)
        with pytest.raises(Interrupted):
            prune(out, 3)
    record = prune(out, resume=True)
    assert 1000 < record.distilling.seconds < 3000
    assert 1000 < record.seconds < 4000
    assert record.distilling.seconds == pytest.approx(sum(record.distilling.phases.values()))


def test_minutes_count_from_the_beginning_of_the_run(
    prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what comes before the blocks, here the calibration text."""
    clock, waited, drawn, spent = time.perf_counter, [0.0], Asked.drawn, []
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + waited[0])

    def slowly(self: Asked, *args: Any) -> Any:
        waited[0] += 1000
        return drawn(self, *args)

    def fitting(self: Trainer, seconds: float) -> int:
        spent.append(self._student.seconds)
        return 2

    monkeypatch.setattr(Asked, "drawn", slowly)
    monkeypatch.setattr(Trainer, "_fitting", fitting)
    prune(tmp_path / "out", settings=[*SETTINGS, "distill.further=false", "distill.minutes=1"])
    assert 1000 < spent[0] < 2000


@pytest.mark.slow
def test_steps_that_were_eased_stay_so(prune: Prune, tmp_path: Path) -> None:
    """Steps too large to help: the first epoch is taken back; then the run is stopped, in the second."""
    settings = ["distill={method: kl, learns: weights, epochs: 4, rate: 0.3, batch: 4}"]
    expected = prune(tmp_path / "whole", settings=settings).distilling.losses
    assert expected[1] > expected[0]
    with pytest.raises(Interrupted):
        prune(tmp_path / "out", 4, settings=settings)
    assert prune(tmp_path / "out", resume=True, settings=settings).distilling.losses == expected
    written = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "out")]
    assert written[0] == written[1]


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path) -> None:
    settings = ["distill={method: kl, learns: together, epochs: 2, rate: 0.001, batch: 4}", "allocation.steps=4"]
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("kill_and_resume.py"), TINY, TEXT, tmp_path, "0", "9", *settings],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    log = json.loads(result.stdout.splitlines()[-1])
    names = {name for _, *names in log for name in names}
    assert any(name.startswith(".state-") for name in names), log  # killed in the middle of a state
    assert any(name.startswith("distilled-") for name in names), log  # between the distilled blocks
    outs = [tmp_path / f"out{run}" for run in range(int(log[-1][0]) + 1)]
    assert len(outs) >= 2
    assert len({(out / "model.safetensors").read_bytes() for out in outs}) == 1
    assert len({str(RunRecord.of(out).distilling.losses) for out in outs}) == 1


def test_the_last_whole_state_counts(tmp_path: Path) -> None:
    def keep(states: Snapshots, step: int) -> None:
        states.keep({"step": step}, [("a", {"x": torch.tensor([step])}), ("", {"y": torch.ones(2)})], urgent=False)

    states = Snapshots(tmp_path)
    assert states.position is None
    for step in range(4):
        keep(states, step)
        again = Snapshots(tmp_path)
        assert again.position == {"step": step}
        assert again.tensors("a")["x"].tolist() == [step]
        assert len(list(tmp_path.iterdir())) == 3  # the one before is gone
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    keep(states, 4)
    for name, content in before.items():  # as if killed before the state of step 3 was removed
        (tmp_path / name).write_bytes(content)
    assert Snapshots(tmp_path).position == {"step": 4}
    (tmp_path / "state-0-00000.safetensors").write_bytes(b"damaged")
    assert Snapshots(tmp_path).position == {"step": 3}
    (tmp_path / "state-1.json").write_text("[" * 10_000)
    assert Snapshots(tmp_path).position is None
    states.clear()
    assert list(tmp_path.iterdir()) == []


def test_states_are_kept_from_time_to_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(snapshots.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(snapshots, "EVERY", 100.0)
    monkeypatch.setattr(snapshots, "SHARE", 0.05)
    states, kept = Snapshots(tmp_path), []

    def groups():
        now[0] += 10  # seconds that writing takes
        kept.append(now[0])
        yield "a", {}

    for at, urgent in [(99, False), (101, False), (120, True), (310, True), (311, False), (520, True), (521, False)]:
        now[0] = float(at)
        states.keep({}, groups(), urgent)
    assert kept == [111, 321, 531]  # at most a twentieth of the time, even if urgent
