"""Progress: what is told of it in a terminal, in a log, in a notebook and in a file, by a clock of the tests."""

import io
import json
import re
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console

import besa
from besa.cli import bars, lines, tracking
from besa.cli.bars import NotebookBar, drawn, terminal_bar
from besa.cli.events import Events, events
from besa.cli.lines import Lines, line
from besa.cli.reports import Report, Reporter
from besa.errors import BesaError, Notice
from besa.progress import BlockDone, BlockNote, labelled
from besa.system.ranks import together

FIRST = BlockDone("model.layers.0", 0.01234, 0.5, 2.0)
AGAIN = BlockDone("model.layers.0", 0.01234, 0.5, 2.0, restored=True)


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def report(done=1.0, total=8.0, note="", block=None, begins=False, left=None) -> Report:
    return Report(done, total, note or (BlockNote(block) if block else ""), block, begins, left)


def test_a_note_on_a_block_is_a_phrase_that_keeps_its_numbers():
    said = []
    labelled(lambda *news: said.append(news), "wanda-0.5")(1, 8, BlockNote(FIRST))
    [(done, total, note)] = said
    assert (done, total, note) == (1, 8, "wanda-0.5: error 0.0123, sparsity 50.00%")
    assert note.block == BlockDone("model.layers.0", 0.01234, 0.5, 2.0, run="wanda-0.5")
    assert BlockNote(AGAIN) == "error 0.0123, sparsity 50.00%, taken from the journal"
    labelled(lambda *news: said.append(news), "dense")(1, 2, "perplexity 3")
    assert said[-1] == (1, 2, "dense: perplexity 3")


def told(clock: Clock, *steps: tuple[float, float, float, str]) -> list[Report]:
    """The reports on what is told: seconds since the last, units done, all units, note."""
    reports: list[Report] = []
    reporter = Reporter([reports.append], clock)
    for seconds, *news in steps:
        clock.now += seconds
        reporter(*news)
    return reports


def test_the_time_left_is_that_of_the_units_so_far(clock):
    reports = told(clock, (0, 0, 4, ""), (3, 0, 4, ""), (10, 1, 4, ""), (20, 2, 4, ""), (6, 4, 4, ""))
    assert [one.left for one in reports] == [None, None, 30.0, 30.0, 0.0]
    assert [one.begins for one in reports] == [True, False, False, False, False]


def test_another_piece_of_work_begins_with_a_new_total_or_less_done(clock):
    reports = told(clock, (0, 1, 4, ""), (8, 3, 4, ""), (1, 1, 4, ""), (1, 2, 5, ""), (2, 3, 5, ""))
    assert [one.begins for one in reports] == [True, False, True, True, False]
    assert [one.left for one in reports] == [None, 4.0, None, None, 4.0]


def test_blocks_of_a_journal_do_not_count_for_the_time_left(clock):
    steps = [(0, 0, 6, ""), (0.1, 1, 6, BlockNote(AGAIN)), (0.1, 2, 6, BlockNote(AGAIN)), (10, 3, 6, BlockNote(FIRST))]
    assert [one.left for one in told(clock, *steps)] == [None, None, None, 30.0]


def test_lines_say_block_error_sparsity_seconds_and_time_left():
    block = BlockDone("model.layers.2", 0.01234, 0.55, 1234.56)
    assert line(report(3, 30, block=block, left=4000.4)) == (
        "block 3/30, model.layers.2: error 0.0123, sparsity 55.00%, 1,234.6 s, 1:06:40 left"
    )
    assert line(report(30, 30, block=block, left=0.0)).endswith("sparsity 55.00%, 1,234.6 s")
    assert line(report(1, 8, block=AGAIN)) == (
        "block 1/8, model.layers.0: error 0.0123, sparsity 50.00%, taken from the journal"
    )
    run = BlockDone("model.layers.0", 0.5, 0.5, 1.0, run="wanda-0.5")
    assert line(report(1, 8, block=run)).startswith("wanda-0.5: block 1/8, model.layers.0: ")
    assert line(report(3, 20, "perplexity 31.24", left=90061)) == "3/20 perplexity 31.24, 1 day, 1:01:01 left"
    assert line(report(5e6, 2e7, "downloading x")) == "5.0/20.0 MB downloading x"
    assert line(report(0, 8)) == "0/8"


def test_a_log_has_a_line_for_each_block_and_at_most_one_a_minute_for_what_has_none(clock, capsys):
    follow = Lines(clock)
    for seconds, one in [
        (1, report(1, 8, "early")),
        (58, report(2, 8, "still early")),
        (1, report(3, 8, "due")),
        (1, report(block=FIRST)),
        (0, report(2, block=FIRST)),
        (59, report(4, 8, "not yet")),
        (1, report(5, 8, "due again")),
    ]:
        clock.now += seconds
        follow(one)
    written = capsys.readouterr().err.splitlines()
    assert all(re.match(r"besa: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d [\db]", text) for text in written)
    assert [text.partition(":")[2][21:] for text in written] == [
        "3/8 due",
        line(report(block=FIRST)),
        line(report(2, block=FIRST)),
        "5/8 due again",
    ]


def test_lines_are_whole_and_plain_whatever_the_width_says(clock, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    Lines(clock)(report(block=BlockDone("[bold]" + "x" * 100, 0.5, 0.5, 1.0)))
    [text] = capsys.readouterr().err.splitlines()
    assert "[bold]" + "x" * 100 in text
    assert "\x1b" not in text


def test_a_line_that_ctrl_c_interrupts_comes_once(monkeypatch, clock):
    """The signal comes when the line is written, but the print has not ended."""

    class Interrupted(io.StringIO):
        def flush(self):
            if self.getvalue().count("\n") == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stderr", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        Lines(clock)(report(block=BlockDone("model.layers.0", 0.5, 0.5, 1.0)))
    lines.err.print("besa: interrupted")
    assert sys.stderr.getvalue().count("model.layers.0") == 1
    assert sys.stderr.getvalue().endswith("besa: interrupted\n")


def drawn_in(monkeypatch: pytest.MonkeyPatch, width: int, *reports: Report, color: str | None = None) -> str:
    """What a terminal of so many columns receives."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, color_system=color)
    monkeypatch.setattr(bars, "err", console)
    with terminal_bar() as follow:
        for one in reports:
            follow(one)
            console._live_stack[0].refresh()
    return stream.getvalue()


@pytest.mark.parametrize("width", [20, 40, 79, 80, 200])
def test_a_bar_keeps_to_its_line_and_cuts_the_note_alone(monkeypatch, width):
    shown = drawn_in(monkeypatch, width, report(2, 8, "x" * 300, begins=True, left=65))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    frame = max(re.split(r"[\r\n]+", plain), key=len)
    assert len(frame) <= width
    if width >= 40:
        assert re.match(r" 25% .*2/8 .*0:01:05 x+…$", frame)
        assert ("━" in frame) == (width >= 80)


@pytest.mark.parametrize("terminals", ["both", "err", "out"])
def test_what_is_printed_beside_a_bar_stays_on_its_stream(monkeypatch, terminals):
    """FORCE_COLOR makes rich draw a bar into a pipe too; above the bar is for what shares its terminal alone."""
    printed, shown = io.StringIO(), io.StringIO()
    monkeypatch.setattr(printed, "isatty", lambda: terminals != "err")
    monkeypatch.setattr(shown, "isatty", lambda: terminals != "out")
    monkeypatch.setattr(sys, "stdout", printed)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(bars, "err", Console(stderr=True, force_terminal=True))
    with terminal_bar() as follow:
        follow(report(begins=True))
        print("a result")
    assert ("a result" in shown.getvalue()) == (terminals == "both")
    assert printed.getvalue() == ("" if terminals == "both" else "a result\n")


def test_no_color_is_respected(monkeypatch):
    assert "\x1b[33m" in drawn_in(monkeypatch, 80, report(begins=True), color="standard")  # the time that has passed
    monkeypatch.setenv("NO_COLOR", "1")
    plain = drawn_in(monkeypatch, 80, report(begins=True), color="standard")
    assert not re.search(r"\x1b\[[0-9;]*3\dm", plain)


class Shown:
    """What a notebook shows, and what is drawn in its place later."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def display(self, data: dict[str, str], raw: bool, display_id: bool) -> "Shown":
        assert raw
        assert display_id
        assert not self.texts
        self.texts.append(data["text/plain"])
        return self

    def update(self, data: dict[str, str], raw: bool) -> None:
        assert raw
        self.texts.append(data["text/plain"])


def test_a_notebook_has_one_bar_that_needs_no_widgets(monkeypatch, clock):
    shown = Shown()
    module = types.ModuleType("IPython.display")
    module.display = shown.display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # cannot be imported
    follow = NotebookBar(clock)
    for seconds, one in [
        (0, report(0, 8, "a", begins=True)),
        (0.1, report(1, 8, "too soon")),
        (0.2, report(4, 8, "b", left=4.4)),
        (0.1, report(8, 8, "c", left=0.0)),
    ]:
        clock.now += seconds
        follow(one)
    assert shown.texts == [
        f"  0% |{' ' * 24}| 0/8, a",
        f" 50% |{'█' * 12}{' ' * 12}| 4/8, left 0:00:04, b",
        f"100% |{'█' * 24}| 8/8, left 0:00:00, c",
    ]
    assert drawn(report(0, 0)).startswith("100%")


def written(path: Path) -> list[dict[str, object]]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(text, parse_constant=no_constant) for text in path.read_text(encoding="utf-8").splitlines()]


def test_a_file_of_progress_is_one_object_a_line(tmp_path, clock):
    path = tmp_path / "new" / "progress.jsonl"
    path.parent.mkdir()
    with path.open("a+b", buffering=0) as file:
        log = Events(file, clock)
        for seconds, one in [
            (0, report(0, 9, "begins", begins=True)),
            (9, report(1, 9, "not due")),
            (1, report(2, 9, "due", left=70.04)),
            (0, report(3, 9, block=FIRST, left=2.0)),
            (0, report(4, 9, block=BlockDone("b", float("nan"), 0.5, 1.0, restored=True, run="wanda"))),
            (1, report(9, 9, "done")),
        ]:
            clock.now += seconds
            log(one)
    found = written(path)
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00$", one.pop("time")) for one in found)
    assert found == [
        {"event": "progress", "done": 0, "total": 9, "note": "begins", "left": None},
        {"event": "progress", "done": 2, "total": 9, "note": "due", "left": 70.0},
        {
            "event": "block", "done": 3, "total": 9, "note": "error 0.0123, sparsity 50.00%", "left": 2.0,
            "name": "model.layers.0", "error": 0.01234, "sparsity": 0.5, "seconds": 2.0, "restored": False, "run": "",
        },
        {
            "event": "block", "done": 4, "total": 9, "left": None,
            "note": "wanda: error nan, sparsity 50.00%, taken from the journal",
            "name": "b", "error": None, "sparsity": 0.5, "seconds": 1.0, "restored": True, "run": "wanda",
        },
        {"event": "progress", "done": 9, "total": 9, "note": "done", "left": None},
    ]  # fmt: skip


def test_runs_are_added_to_the_file_and_a_torn_line_is_ended(tmp_path):
    path = tmp_path / "new" / "progress.jsonl"
    with events(path):
        pass
    path.write_bytes(path.read_bytes() + b'{"event": "prog')
    for error, reason in [
        (BesaError("Too few tokens."), "Too few tokens."),
        (KeyboardInterrupt(), "interrupted"),
        (ValueError("a bug"), "ValueError: a bug"),
    ]:
        with pytest.raises(type(error)), events(path):
            raise error
        assert json.loads(path.read_text().splitlines()[-1])["error"] == reason
    texts = path.read_text().splitlines()
    assert texts[2] == '{"event": "prog'
    kinds = [json.loads(text)["event"] for text in texts[:2] + texts[3:]]
    assert kinds == ["begin", "end"] * 4
    begin = json.loads(texts[0])
    assert begin["command"] == sys.argv
    assert begin["besa"] == besa.__version__
    assert json.loads(texts[1])["error"] is None


def test_a_file_that_the_run_lacks_is_not_the_file_of_progress(tmp_path):
    with pytest.raises(FileNotFoundError, match="model"), events(tmp_path / "p.jsonl"):
        (tmp_path / "model").read_text()


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(BesaError, match=r"taken/x cannot be written: .*\."), events(tmp_path / "taken" / "x"):
        raise AssertionError("it was opened")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full here")
def test_a_disk_that_gets_full_does_not_end_the_work(tmp_path, monkeypatch):
    with (
        (tmp_path / "progress.jsonl").open("a+b", buffering=0) as file,
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        log = Events(file)
        monkeypatch.setattr(log, "_file", full)
        with pytest.warns(Notice, match="No more progress is written as JSON: No space left on device"):
            log.write("block")
        log.write("block")


@pytest.mark.parametrize(
    ("console", "quiet", "kind"),
    [
        ({"force_terminal": True}, False, "follow"),
        ({"force_terminal": False}, False, "Lines"),
        ({"force_terminal": True, "force_interactive": False}, False, "Lines"),  # such as TERM=dumb
        ({"force_jupyter": True}, False, "NotebookBar"),
        ({"force_terminal": True}, True, None),
        ({"force_terminal": False}, True, None),
    ],
)
def test_who_shows_progress(monkeypatch, console, quiet, kind):
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=None))
    made = Console(file=io.StringIO(), **console)
    monkeypatch.setattr(tracking, "err", made)
    monkeypatch.setattr(bars, "err", made)
    with besa.show_progress(quiet=quiet) as progress:
        _, *shown = progress._followers
        names = [getattr(one, "__name__", type(one).__name__) for one in shown]
    assert names == ([kind] if kind else [])


def test_of_several_ranks_only_the_first_shows_progress(tmp_path, capsys):
    path = tmp_path / "progress.jsonl"
    for number in (1, 0):
        with together(number, 2), besa.show_progress(json_progress=path) as progress:
            progress(1, 8, BlockNote(FIRST))
        if number:
            assert not path.exists()
            assert capsys.readouterr().err == ""
    assert capsys.readouterr().err.count("block 1/8") == 1
    assert [one["event"] for one in written(path)] == ["begin", "block", "end"]
    assert lines.EVERY == 60
