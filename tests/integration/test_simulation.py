"""Simulating checkpoints of the tiny Llama: every linear, their means, and what the command line makes of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import besa
from besa import BesaError
from besa.cli import app
from besa.simulator import Accelerator, cycles
from besa.simulator.bandwidth import load_cycles

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
KINDS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
SMALL = Accelerator(lines=4, multipliers=4)


def sparse(folder: Path, share: float) -> Path:
    """The tiny Llama with so large a share of its weights zero, more of them in some columns than in others."""
    shutil.copytree(TINY, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, w_OI in tensors.items():
        if "_proj.weight" in name:
            each_I = (share + 0.3 * torch.rand(w_OI.shape[1], generator=generator) - 0.15).clamp(0, 1)
            w_OI[torch.rand(w_OI.shape, generator=generator) < each_I] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse(tmp_path_factory.mktemp("sparse") / "half", 0.5)


def test_every_linear_is_simulated_by_its_own_zeros(half: Path) -> None:
    found = besa.simulate(half, tokens=(1, 7), accelerator=SMALL)
    tensors = load_file(half / "model.safetensors")
    assert [linear.name for linear in found.linears] == [f"model.layers.{i}.{kind}" for i in range(8) for kind in KINDS]
    for linear in found.linears:
        w_OI = tensors[f"{linear.name}.weight"]
        rows, columns = linear.shape
        assert w_OI.shape == (rows, columns)
        own = cycles((w_OI != 0).sum(dim=0), rows, SMALL)
        assert linear.nnz == int((w_OI != 0).sum()) == round((1 - linear.sparsity) * w_OI.numel())
        assert [linear.cycles_published, linear.cycles_corrected] == [own.published, own.corrected]
        assert [linear.cycles_best, linear.cycles_bound] == [own.best, own.bound]
        for count, memory in linear.cycles_memory.items():
            load = load_cycles(rows, columns, own.dense_columns, own.rest, count, SMALL)
            assert memory == max(load, count * own.corrected)
        assert linear.utilization.denser == own.denser / own.corrected
        assert linear.utilization.sparser == own.sparser / own.corrected
        assert linear.dense.cycles_corrected == linear.dense.cycles_bound == rows * columns // 16
        assert linear.dense.cycles_memory[1] >= linear.dense.cycles_corrected
        assert linear.speedup["best"] == linear.dense.cycles_best / own.best


def test_high_weights_are_compared_with_the_same_laid_wide(half: Path) -> None:
    linears = {linear.name: linear for linear in besa.simulate(half, [1]).linears}
    up, down = (linears[f"model.layers.0.mlp.{name}_proj"] for name in ("up", "down"))
    assert up.shape == down.shape[::-1] == (256, 96)
    # 96 × 256 in pieces of 96, 96 and 64 columns: 96 · 96, 96 · 96 and 64 · 64 by 4096, rounded up.
    assert up.dense.cycles_published == down.dense.cycles_published == 3 + 3 + 1
    assert up.dense.cycles_corrected == 6
    assert down.dense.cycles_corrected == 3 + 3 + 2


def test_means_are_over_blocks(half: Path) -> None:
    found = besa.simulate(half, (1, 32), accelerator=SMALL)
    assert [kind.name for kind in found.kinds] == KINDS
    for kind in found.kinds:
        own = [linear for linear in found.linears if linear.name.endswith(kind.name)]
        assert kind.linears == len(own) == 8
        assert kind.cycles_published == pytest.approx(sum(linear.cycles_published for linear in own) / 8)
        assert kind.cycles_memory[32] == pytest.approx(sum(linear.cycles_memory[32] for linear in own) / 8)
        assert kind.dense.cycles_best == own[0].dense.cycles_best
        assert kind.sparsity == pytest.approx(sum(linear.sparsity for linear in own) / 8)
        busy = sum(linear.utilization.sparser * linear.cycles_corrected for linear in own)
        assert kind.utilization.sparser == pytest.approx(busy / 8 / kind.cycles_corrected)
    for figure, total in found.block.each().items():
        assert total == pytest.approx(sum(kind.each()[figure] for kind in found.kinds))
    assert found.block.speedup["corrected"] == found.block.dense.cycles_corrected / found.block.cycles_corrected


def test_nothing_left_costs_nothing(tmp_path: Path) -> None:
    found = besa.simulate(sparse(tmp_path / "none", 2.0), [1], accelerator=SMALL)
    assert found.block.cycles_published == found.block.cycles_bound == 0
    assert found.block.speedup["published"] is None
    inputs_and_outputs = sum(sum(linear.shape) for linear in found.linears) / 8
    per_cycle = SMALL.bandwidth / SMALL.clock_hz
    assert inputs_and_outputs <= found.block.cycles_memory[1] * per_cycle < inputs_and_outputs + 7 * per_cycle


def test_table_and_json(half: Path, tmp_path: Path) -> None:
    few = sparse(tmp_path / "few", 0.2)
    file = tmp_path / "deep" / "simulation.json"
    arguments = ["simulate", str(half), "--method-baseline", str(few), "--tokens", "1, 32", "--json", str(file)]
    told = CliRunner().invoke(app, arguments, env={"COLUMNS": "100"})
    assert told.exit_code == 0, told.output
    lines = told.output.splitlines()
    assert max(len(line) for line in lines if str(half.parent) not in line) <= 100  # paths are never broken
    assert ["q", "k", "v", "o", "gate", "up", "down", "all"] in [line.split() for line in lines]
    rows = [line.split()[0] for line in lines if line.strip()]
    assert [rows.count(word) for word in ("dense", "few", "half", "speed-up", "sparsity")] == [6, 6, 6, 6, 1]
    found = json.loads(file.read_text())
    assert found["linears"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert found == json.loads(besa.Simulation.model_validate(found).model_dump_json())
    [baseline] = found["baselines"]
    assert (Path(found["model"]).name, Path(baseline["model"]).name) == ("half", "few")
    assert found["block"]["sparsity"] > baseline["block"]["sparsity"] > 0
    (other,) = [line for line in lines if line.split()[:1] == ["few"]][1:2]
    assert other.split()[-1] == f"{baseline['block']['cycles_corrected']:.1f}"
    start = next(number for number, line in enumerate(lines) if "corrected formula" in line)
    (own,) = [line for line in lines[start : start + 5] if line.split()[:1] == ["half"]]
    assert own.split()[1:] == [f"{kind['cycles_corrected']:.1f}" for kind in [*found["kinds"], found["block"]]]
    assert set(found["linears"][0]["cycles_memory"]) == {"1", "32"}


def test_bad_input_is_refused(half: Path) -> None:
    for tokens in ([], [0], [8, -1]):
        with pytest.raises(BesaError, match=r"must be positive|greater than or equal to 1"):
            besa.simulate(half, tokens)
    runner = CliRunner()
    with pytest.raises(BesaError, match="--tokens 1,x: give a number"):
        runner.invoke(app, ["simulate", str(half), "--tokens", "1,x"], catch_exceptions=False)
