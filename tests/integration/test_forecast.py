"""The forecast for GPUs: its arithmetic by hand, and the run without numbers against one with numbers."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks import gpu_forecast, weightless
from benchmarks.gpu_forecast import Card, phase
from benchmarks.operations import Operation, Seen
from besa import Recipe, compress
from tests import pretend
from tests.slowly import some_slow

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
CARD = Card("a card", 100e12, 50e12, 10e12, 1e12, 32e9, 80 * 10**9, "made up")
PRODUCT = Operation("mm", "half", 6e12, 1e9)  # at 0.6 of 100e12 a second: 0.1 s
SUM = Operation("sum", "other", 0, 75e9)  # at 0.75 of 1e12 a second: 0.1 s
SMALL = Operation("add", "other", 0, 8)


def test_an_operation_takes_as_long_as_its_slowest_part() -> None:
    assert CARD.seconds(PRODUCT) == pytest.approx(0.1)
    assert CARD.seconds(replace(PRODUCT, kind="tf32")) == pytest.approx(0.2)
    assert CARD.seconds(replace(PRODUCT, kind="float32")) == pytest.approx(1.0)
    assert CARD.seconds(replace(PRODUCT, bytes=150e9)) == pytest.approx(0.2)
    assert CARD.seconds(SUM) == pytest.approx(0.1)
    assert CARD.seconds(SMALL) == gpu_forecast.SHORTEST


def test_a_phase_is_as_long_as_what_limits_it() -> None:
    found = phase(CARD, Seen(Counter({PRODUCT: 3, SUM: 1}), syncs=2), from_disk=False)
    assert (found.limit, found.seconds) == ("products", pytest.approx(0.4))
    assert found.host == pytest.approx(4 * 4e-6 + 2 * 20e-6)
    assert (found.teraflops, found.gigabytes, found.launches, found.syncs) == (18.0, 78.0, 4, 2)
    assert phase(CARD, Seen(Counter({PRODUCT: 1, SUM: 2})), from_disk=False).limit == "bytes"
    launching = phase(CARD, Seen(Counter({SMALL: 1000})), from_disk=False)
    assert (launching.limit, launching.seconds) == ("launches", pytest.approx(4e-3))  # the device needs 2e-3
    travelling = phase(CARD, Seen(to_device=24 * 10**9, to_host=24 * 10**9), from_disk=False)
    assert (travelling.limit, travelling.seconds) == ("pcie", pytest.approx(2.0))
    reading = phase(CARD, Seen(to_device=5 * 10**9), from_disk=True)
    assert (reading.limit, reading.seconds) == ("disk", pytest.approx(2.0))


def test_a_model_is_its_first_block_and_further_ones() -> None:
    one = Seen(Counter({PRODUCT: 2, SMALL: 5}), 3, 100, 10, 7)
    two = Seen(Counter({PRODUCT: 3, SMALL: 5, SUM: 1}), 4, 150, 12, 9)
    each = two.less(one)
    assert each == Seen(Counter({PRODUCT: 1, SUM: 1}), 1, 50, 2, 9)
    whole = one.and_again(each, 9)
    assert whole == Seen(Counter({PRODUCT: 11, SMALL: 5, SUM: 9}), 12, 550, 28, 7)


def test_a_whole_run_adds_up() -> None:
    """Two blocks of 7B, of which a block takes 0.1 s of products and comes with 2.5 GB from the disk."""
    once = {"before": Seen(to_device=5 * 10**9, peak=9), "load": Seen(to_device=10), "rank": Seen(peak=10**9)}
    twice = {
        "before": Seen(to_device=5 * 10**9, peak=9),
        "load": Seen(to_device=10 + 2_500_000_000),
        "rank": Seen(Counter({PRODUCT: 1}), peak=2 * 10**9),
    }
    found = gpu_forecast.forecast(CARD, (once, twice), Recipe.load("wanda"), "7B")
    write = 2.5 / 2 + 2.5 / 1.7
    outside = 2 * 32000 * 4096 * 2 / 1e9
    after = write + outside / 2 + (32 * 2.5 + outside) / 2.5
    assert found["before_seconds"] == pytest.approx(2.0)
    assert found["block_seconds"] == pytest.approx(write)  # it hides the reading, and that the products
    assert found["minutes"] == pytest.approx((2 + 32 * write + after) / 60)
    assert (found["peak_gigabytes"], found["fits"]) == (2.0, True)


@pytest.mark.parametrize("name", some_slow(["wanda", "besa", "fast", "sparsegpt"], {"fast", "sparsegpt", "wanda"}))
def test_a_run_without_numbers_asks_for_what_a_run_with_numbers_does(tmp_path: Path, name: str) -> None:
    """Launches, and bytes that travel, of the blocks of a small model."""
    blocks, settings = 2, {"samples": 4, "seqlen": 48, "dtype": "bfloat16"}
    config = LlamaConfig.from_pretrained(TINY, num_hidden_layers=blocks, dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16)
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers = blocks
    recipe = Recipe.load(name)
    if recipe.descent is not None:
        recipe = Recipe.load(name, overrides=["allocation.steps=5"])
    batch = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weightless, "default_batch", lambda *_: batch)
        shapes = weightless.seen(config, recipe, settings["samples"], settings["seqlen"], pretend.MEMORY)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    pretend.reset()
    text = str(TINY / "calibration.txt")
    compress(model, recipe, text, tokenizer=tokenizer, device="pretend", batch=batch, **settings)
    launches = Counter({key: n for key, n in pretend.counts.launches.items() if key not in weightless.FREE})
    found: Counter[str] = Counter()
    for part in shapes.values():
        for operation, times in part.operations.items():
            found[operation.name] += times
    expected = Counter({key.removeprefix("aten::"): number for key, number in launches.items()})
    assert not found - expected
    assert (expected - found).total() <= 2  # what begins a run
    assert sum(part.syncs for part in shapes.values()) == pretend.counts.syncs.total()


def test_every_operator_has_shapes() -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("besa::")]
    assert len(names) >= 9
    assert [name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta")] == []


def test_products_are_counted_as_torch_counts_them() -> None:
    config = LlamaConfig.from_pretrained(TINY, num_hidden_layers=1, dtype="bfloat16")
    trace = weightless.Trace()
    with trace.open():
        decoder = weightless.WeightlessDecoder(config, trace)
        with decoder.embeddings(pretend.DEVICE), decoder.opened(decoder.blocks[0], pretend.DEVICE):
            decoder.model.base_model(torch.zeros(2, 40, dtype=torch.int64).to(pretend.DEVICE), use_cache=False)
    found = sum(one.flops * n for one, n in trace.phases["before"].operations.items() if "attention" not in one.name)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.base_model(torch.zeros(2, 40, dtype=torch.int64), use_cache=False)
    expected = sum(
        number for operation, number in counter.get_flop_counts()["Global"].items() if "attention" not in str(operation)
    )
    assert found > 0
    assert found == pytest.approx(expected, rel=0.02)  # the frequencies of rotary embeddings are a product too


def test_the_written_forecast_says_what_it_is() -> None:
    written: dict[str, Any] = json.loads(gpu_forecast.RESULTS.read_text())
    assert written["note"] == gpu_forecast.NOTE
    assert len(written["forecasts"]) == 2 * 3 * 3
    assert {card["name"] for card in written["cards"]} == {card.name for card in gpu_forecast.CARDS}
    lines = gpu_forecast.tables(written["forecasts"])
    assert lines[0] == gpu_forecast.NOTE
    on_h100 = {(one["shape"], one["recipe"]): one for one in written["forecasts"] if one["card"].startswith("H100")}
    for (shape, _), one in on_h100.items():
        assert one["fits"]
        assert one["minutes"] <= {"7B": 6, "70B": 45}[shape]
        assert one["peak_gigabytes"] <= 60
