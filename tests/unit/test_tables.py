"""Tables on narrow terminals and on none: every name and number is there, whole."""

import io
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from rich.box import SIMPLE
from rich.console import Console, RenderableType

import besa
from besa.checkpoint.inspection import BlockContents, Contents, LinearContents
from besa.cli import consoles
from besa.cli.show import measuring, pruning, running, studying
from besa.cli.tables import Whole
from besa.planning import list_recipes
from besa.runtime.timings import FIRST, Bench, ModelSpeed, Timing
from besa.storage.amounts import in_words
from besa.studies.comparing import Comparison
from besa.studies.rows import Row

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
NAMES = ["runs/qwen2.5-0.5b/half-sparse/dense-model", "runs/qwen2.5-0.5b/half-sparse/besa-int4-packed"]
DOMAINS = ["web", "encyclopedia", "code", "worked maths", "dialogue", "technical", "multilingual"]


def printed(shown: RenderableType, width: int | None) -> str:
    """As a terminal of so many columns receives it; None for a file or a pipe, which has no width."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=width is not None, width=width, color_system=None, soft_wrap=True)
    console.print(shown)
    return stream.getvalue()


def bench() -> tuple[RenderableType, list[str]]:
    timings = [Timing(work=work, tokens=16, seconds=0.5, low=0.4, high=0.75, limit=0.25) for work in ("decode 1", "x")]
    shared = {"revision": None, "dtype": "bfloat16", "file_bytes": 9e9, "resident_bytes": None, "step_bytes": 8e9}
    models = [
        ModelSpeed(model=name, form=form, timings=timings, **shared)
        for name, form in zip(NAMES, ("dense, prepacked", "sparse"), strict=True)
    ]
    facts = {"bandwidth": 1e10, "rounds": 7, "created": "now", "versions": {}, "machine": {"threads": 2}}
    numbers = ["median 32.0", "quartiles 21.3–40.0", "× 1.00", "limit 64.0", "of limit 50%", "file, MB 9,000"]
    return running.benched(Bench(models=models, **facts)), [
        *NAMES,
        "decode 1",
        "dense, prepacked",
        *numbers,
        "rounds: 7, threads: 2",
    ]


def comparison() -> tuple[RenderableType, list[str]]:
    means = {name: 10.25 + place for place, name in enumerate(DOMAINS)}
    rows = [
        Row(recipe=name, sparsity=0.5, seeds=1, mean=means, spread={}, values={}, seconds=1234.0, ratios={"code": 1.25})
        for name in NAMES
    ]
    facts = {"model": NAMES[0], "calibration": "128 sequences of a mixture", "window": 2048, "dense": rows[0]}
    result = Comparison.model_construct(**facts, max_windows=None, conditions={}, rows=rows, earlier=[])
    numbers = ["sparsity 50.0000%", "seconds 1,234", "web 10.25", "code 12.25", "worked maths 13.25"]
    return studying.compared(result, Path("compare")), [*NAMES, *numbers]


def test_quartiles_of_times_and_of_rates_begin_with_the_smaller() -> None:
    facts = {"tokens": 64, "seconds": 0.026, "low": 0.018, "high": 0.032}
    assert Timing(work=FIRST, limit=0.000464, **facts).paces() == ["26 ms", "18 ms", "32 ms", "0.464 ms"]
    assert Timing(work=FIRST, limit=0.002, **facts).paces()[3] == "2.00 ms"
    assert Timing(work="prefill 64", limit=0.01, **facts).paces() == ["2,461.5", "2,000.0", "3,555.6", "6,400.0"]


def test_bytes_are_told_in_a_unit_in_which_they_are_no_zero() -> None:
    told = {2.5e9: "2.50 GB", 999e6: "999 MB", 1e6: "1 MB", 64_000: "64 kB", 256: "256 bytes"}
    assert {size: in_words(size) for size in told} == told


SHOWN: dict[str, Callable[[], tuple[RenderableType, list[str]]]] = {"bench": bench, "compare": comparison}


@pytest.mark.parametrize("width", [40, 80, None])
@pytest.mark.parametrize("name", SHOWN)
def test_names_and_numbers_are_whole(name: str, width: int | None) -> None:
    shown, parts = SHOWN[name]()
    text = printed(shown, width)
    assert "…" not in text
    assert text.count(NAMES[0]) >= 3  # in rows and in a title or a caption
    for part in parts:
        name, _, number = part.rpartition(" ")
        assert part in text if width else number in text and name in text, part


@pytest.mark.parametrize("name", SHOWN)
def test_without_a_terminal_a_row_is_a_line(name: str) -> None:
    shown, _ = SHOWN[name]()
    rows = [line for line in printed(shown, None).splitlines() if NAMES[1] in line]
    assert all("50%" in line or "9,000" in line or "50.0000%" in line for line in rows)
    assert len(rows) == {"bench": 3, "compare": 1}[name]  # of bench, two kinds of work and the sizes


def test_numbers_of_rows_stand_below_each_other() -> None:
    table = Whole(box=SIMPLE)
    table.add_column("name")
    for column in ("first", "second", "third", "fourth"):
        table.add_column(column, justify="right")
    table.add_row("a", "1", "2", "3", "4")
    table.add_row("b", "10,000", "", "300", "4")
    assert printed(table, 30) == (
        "a\n  first 1       second 2\n  third 3    fourth 4\nb\n  first 10,000\n  third 300  fourth 4\n"
    )
    assert "a     " in printed(table, 60)
    assert printed(table, 60) == printed(table, None)


@pytest.mark.parametrize("width", [40, 80])
def test_sentences_are_broken_between_words_and_no_word_is_lost(width: int) -> None:
    shown = pruning.planned(besa.plan(str(TINY), "wanda", samples=4, seqlen=16, device="cpu"))
    text, whole = printed(shown, width), printed(shown, None)
    lines = text.splitlines()
    assert max(map(len, lines[1:])) <= width < max(map(len, whole.splitlines()))

    def words(text: str) -> list[str]:
        cells = [[part.strip() for part in line.split("│")[1:3]] for line in text.splitlines() if "│" in line]
        return sorted(word for column in zip(*cells, strict=True) for word in " ".join(column).split())

    assert words(text) == words(whole)


def test_recipes_are_read_in_eighty_columns() -> None:
    lines = printed(pruning.recipes_listed(list_recipes(128, 2048)), 80).splitlines()[:-1]  # without the caption
    assert max(map(len, lines)) <= 80
    purposes = [line for line in lines if line.strip() and "passes: " not in line]
    assert sum(len(line.split()) for line in purposes) / len(purposes) > 5  # words in a line


def test_brackets_and_colons_of_a_name_are_no_markup() -> None:
    name = "runs/mod[v2]:cat:[/b]"
    table = Whole(title=name, caption=name)
    table.add_column(name)
    table.add_row(name)
    for console in (consoles.out, consoles.err):
        with console.capture() as captured:
            console.print(table)
        assert captured.get().count(name) == 4


def test_blocks_that_are_unlike_stay_in_their_columns() -> None:
    # A dense block, then one with experts and without `o_proj`: no cell may move to the left.
    own = {"self_attn.q_proj": 1, "self_attn.o_proj": 2, "mlp.up_proj": 3}
    others = {"self_attn.q_proj": 4, "mlp.experts.0.up_proj": 5, "mlp.experts.1.up_proj": 6, "mlp.up_proj": 7}
    linears = [
        LinearContents(name=f"layers.{n}.{name}", shape=[2, 5], zeros=zeros, sparsity=zeros / 10, bytes=20, parts={})
        for n, block in enumerate((own, others))
        for name, zeros in block.items()
    ]
    sums = {"weights": 10, "zeros": 5, "bytes": 3_000_000, "parts": {}, "bits_per_weight": 16.0}
    blocks = [BlockContents(name=f"layers.{n}", sparsity=(n + 1) / 8, **sums) for n in range(2)]
    content = Contents(model="m", file_bytes=1, sparsity=0.5, blocks=blocks, linears=linears, **sums)
    lines = printed(measuring.contents(content), None).splitlines()
    head, *rows = (line for line in lines if re.match(r" *(block|\d) ", line))
    ends = [match.end() for match in re.finditer(r"\S+", head)]
    assert head.split() == ["block", "q", "o", "mlp.up_proj", "*.up_proj", "all", "MB"]
    cells = [[row[start:end].strip() for start, end in pairwise([0, *ends])] for row in rows]
    assert cells[0] == ["0", "10.00", "20.00", "30.00", "", "12.50", "3.0"]
    assert cells[1] == ["1", "40.00", "", "70.00", "55.00", "25.00", "3.0"]
    assert "self_attn.q_proj, self_attn.o_proj, mlp.up_proj, mlp.experts.*.up_proj" in lines[-1]
