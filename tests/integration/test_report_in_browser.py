"""The report as a browser shows it: on a desk and a phone, in both schemes and on paper."""

import json
import math
from importlib import resources

import pytest

import besa
from besa.report import load_run, render
from tests.browser import browser, found
from tests.report_runs import DISTILLED, evaluation, record, speeds, written

pytestmark = pytest.mark.skipif(found() is None, reason="there is no Chromium or Chrome here")

DESK, PHONE, PAPER = 1100, 390, 720
WINDOWS = [(width, dark) for width in (DESK, PHONE) for dark in (False, True)]
OPEN = "document.querySelectorAll('details').forEach(one => one.open = true)"
# Elements that reach beyond the window, unless they are within one that scrolls by itself.
BEYOND = """[...document.body.querySelectorAll('*')].filter(one => {
    const scrolled = one.parentElement.closest('.scroll, .drawings, pre');
    return one.getClientRects().length && !scrolled && one.getBoundingClientRect().right > innerWidth + 0.5;
}).map(one => one.outerHTML.slice(0, 80))"""
# Words of plots that reach beyond their plot, where they would be cut off.
CUT = """[...document.querySelectorAll('svg')].filter(one => one.getClientRects().length).flatMap(plot => {
    const whole = plot.getBoundingClientRect();
    return [...plot.querySelectorAll('text')].filter(word => {
        const own = word.getBoundingClientRect();
        return own.left < whole.left - 1 || own.right > whole.right + 1
            || own.top < whole.top - 1 || own.bottom > whole.bottom + 1;
    }).map(word => `${word.textContent} in ${plot.ariaLabel}`);
})"""
PLOTS = """[...document.querySelectorAll('svg')].filter(one => one.getBoundingClientRect().width > 40
    && one.getBoundingClientRect().height > 10).map(one => one.getAttribute('aria-label'))"""
COLUMN = "[...document.querySelectorAll('.results tbody tr')].map(row => row.cells[{}].textContent.trim())"

LAST = """[...document.querySelectorAll('table')].filter(one => one.tFoot)
    .map(one => one.rows[one.rows.length - 1].cells[0].textContent)"""
STRIP = """(one => [one.x + one.width / 2, one.y + one.height / 2])(
    document.querySelectorAll('#error .tip')[3].getBoundingClientRect())"""


@pytest.fixture(scope="module")
def page(tmp_path_factory, tiny_llama_folder):
    """A report with every section."""
    root = tmp_path_factory.mktemp("runs")
    learned = record("besa", blocks=24, distilling=DISTILLED)
    for block in learned["blocks"]:
        steps = 40 if block["index"] % 3 else 150
        block["losses"] = [0.02 * (block["index"] + 1) * (0.3 + math.exp(-step / 30)) for step in range(steps)]
    texts = {"wikitext2": 34.0, "c4": 50.125}
    runs = [
        written(root / "dense", measured=evaluation({"wikitext2": 20.0, "c4": 31.5})),
        written(root / "wanda", record("wanda", blocks=24, seed=8, seconds=9.5), evaluation(texts)),
        written(root / "besa", learned, evaluation({"wikitext2": 134.0, "c4": 49.0})),
        written(root / "a-run-with-a-long-name-of-its-own", record("magnitude", blocks=24), evaluation(texts)),
    ]
    (root / "besa" / "besa_bench.json").write_text(json.dumps(speeds()))
    (root / "besa" / "besa_simulation.json").write_text(besa.simulate(tiny_llama_folder, [1, 32]).model_dump_json())
    path = root / "report.html"
    path.write_text(render([load_run(run.folder) for run in runs]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def window():
    with browser() as opened:
        yield opened


@pytest.mark.parametrize(("width", "dark"), WINDOWS)
def test_all_is_there_and_nothing_reaches_beyond_the_window(page, window, width, dark):
    window.open(page, width, dark=dark)
    plots = window.run(PLOTS)
    assert len(plots) == len({*plots}) == 2 + 2 + 1 + 3 + 1 + 1 + 2 + 1 + 4, plots
    assert window.run("[...document.querySelectorAll('nav a')].every(one => document.querySelector(one.hash))")
    window.run(OPEN)
    assert window.run("document.documentElement.scrollWidth") == width
    assert window.run(BEYOND) == []
    assert window.run(CUT) == []
    assert window.complaints == []


@pytest.mark.parametrize(("width", "dark"), [(DESK, False), (PHONE, True)])
def test_people_can_read_it(page, window, width, dark):
    window.open(page, width, dark=dark)
    window.run(OPEN)
    background = window.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(22, 22, 21)") == dark
    # Whatever is drawn over a shade at the right edge counts as undecided.
    window.run(
        "document.querySelectorAll('.scroll, .drawings, pre').forEach(one => one.style.backgroundImage = 'none')"
    )
    window.run((resources.files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8") + ";0")
    found = json.loads(window.run("axe.run().then(found => JSON.stringify(found))"))
    wrong = [
        (one["id"], node["html"][:120], node["failureSummary"]) for one in found["violations"] for node in one["nodes"]
    ]
    assert wrong == []
    assert any(one["id"] == "color-contrast" for one in found["passes"])
    undecided = [node["html"] for one in found["incomplete"] for node in one["nodes"]]
    assert [html for html in undecided if not html.startswith("<text ")] == []  # in plots; see test_report.py


def test_tables_are_sorted_by_numbers(page, window):
    window.open(page, DESK)
    assert window.run(COLUMN.format(2)) == ["20.00", "34.00", "134.00", "34.00"]
    press = "document.querySelectorAll('.results thead button')[{}].click()"
    window.run(press.format(2))
    assert window.run(COLUMN.format(2)) == ["20.00", "34.00", "34.00", "134.00"]
    assert window.run("document.querySelector('[aria-sort]').textContent") == "Perplexitywikitext2"
    window.run(press.format(2))
    assert window.run(COLUMN.format(2)) == ["134.00", "34.00", "34.00", "20.00"]
    window.run(press.format(0))
    assert window.run(COLUMN.format(0))[-2:] == ["magnitude", "wanda"]
    for _ in range(2):  # what is missing stays last
        window.run(press.format(6))
        assert window.run(COLUMN.format(0))[-1] == "dense"
    assert window.run(COLUMN.format(0))[2] == "wanda"  # 9.5 s
    window.run("document.querySelectorAll('thead th:first-child button').forEach(one => { one.click(); one.click(); })")
    assert {*window.run(LAST)} == {"all", "mean", "sparsity"}
    assert window.complaints == []


def test_the_pointer_is_told_values(page, window):
    window.open(page, DESK)
    # Once the page has been drawn there: scrolling takes the words away.
    frame = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50))))"
    window.run(f"document.querySelector('#error').scrollIntoView(); {frame}")
    x, y = window.run(STRIP)
    assert window.run("document.querySelector('.told').hidden")
    window.move(x, y)
    assert (
        window.run("document.querySelector('.told').textContent")
        == "block 3\nwanda: 0.0492\nbesa: 0.0492\nmagnitude: 0.0492"
    )
    assert not window.run("document.querySelector('.told').hidden")
    window.move(2, 2)
    assert window.run("document.querySelector('.told').hidden")


def test_paper_is_white_and_as_wide_as_a_page(page, window):
    window.open(page, PAPER, dark=True, media="print")
    assert window.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert window.run("document.documentElement.scrollWidth") == PAPER
    assert window.run("[...document.querySelectorAll('.numbers, nav')].every(one => !one.getClientRects().length)")
    assert window.run(CUT) == []
