"""The forecast for several ranks: its arithmetic by hand, and its bytes against those of a plan."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from benchmarks import scaling
from benchmarks.scaling import RESULTS, WIRES, Wire
from benchmarks.weightless import seen
from besa import Recipe, plan
from tests import pretend
from tests.slowly import some_slow

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"


def test_an_exchange_takes_its_bytes_and_the_way_round_the_ring() -> None:
    wire = Wire("made up", 5, 1e9, 1e-3, "")
    assert scaling._exchange(wire, 2e9, 3) == pytest.approx(2 + 3 * 4e-3)
    assert scaling._exchange(WIRES[0], 0.0, 100) == 0.0


@pytest.mark.parametrize("name", some_slow(["wanda", "sparsegpt", "fast", "besa"], {"fast", "sparsegpt", "wanda"}))
@pytest.mark.parametrize("count", some_slow([2, 3], {2}))
def test_a_run_without_numbers_sends_what_a_plan_says(tmp_path: Path, name: str, count: int) -> None:
    config = LlamaConfig.from_pretrained(TINY, num_hidden_layers=2, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    recipe = Recipe.load(name, overrides=["allocation.steps=7"] if name == "besa" else [])
    found = seen(config, recipe, 12, 24, pretend.MEMORY, count)
    planned = plan(tmp_path, recipe, samples=12, seqlen=24, device="cpu", ranks=count)
    for phase, size in planned.traffic_bytes.items():
        words = 0.02 * 2 * size + 4000  # names and numbers of tokens, as JSON
        assert 2 * size - 2 <= found[phase].sent <= 2 * size + words, phase  # of two blocks, whose bytes are rounded


def test_measurements_are_the_middle_of_their_rounds() -> None:
    runs = [{"seconds": s, "phases": {"rank": s / 2, "load": 1.0}, "sent": {"rank": 8.0}} for s in (4.0, 2.0, 3.0)]
    found = scaling._middle(runs)
    assert found == {"seconds": 3.0, "phases": {"rank": 1.5, "load": 1.0}, "sent": {"rank": 8.0}}
    one = {"seconds": 3.0, "phases": {"rank": 1.5, "load": 0.01}, "sent": {}}
    two = {"seconds": 2.0, "phases": {"rank": 0.5, "load": 0.01}, "sent": {"rank": 2e6}}
    rows = scaling._measured_table({"wanda": {"1": one, "2": two}})[2:]
    assert rows == [
        "| wanda | whole run | 3.0 | 2.0 | 1.50 | 2.00 MB |",
        "| wanda | rank | 1.5 | 0.5 | 3.00 | 2.00 MB |",
    ]


def test_the_written_forecast_says_what_it_is_and_that_learning_does_not_scale() -> None:
    written = json.loads((RESULTS / "scaling-forecast.json").read_text(encoding="utf-8"))
    assert "Nothing of it was measured" in written["note"]
    for shape in ("7B", "70B"):
        learning = [
            one["phases"]["allocate"]
            for one in written["forecasts"]
            if (one["shape"], one["recipe"]) == (shape, "besa")
        ]
        assert len(learning) == 3
        assert min(learning) == learning[0]
