import base64
import hashlib
import json
import math
import re
import shlex
import shutil
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
import yaml
from markupsafe import Markup

import besa
from besa.errors import BesaError
from besa.methods.recipe import Recipe
from besa.record import RunRecord
from besa.report import load_run, render
from besa.report.allocation import parts
from besa.report.plots import COLORS
from besa.report.runs import labels
from besa.report.svg import PAGE, Drawing
from besa.storage.formats.container import FORMAT, VERSION
from tests.report_runs import DISTILLED, evaluation, linear, record, speeds, written

HOSTILE = '<script>alert("x")</script>'


@pytest.fixture
def drawn():
    """Asked for by what looks at charts."""


@pytest.fixture(autouse=True)
def without_charts(request, monkeypatch):
    """Drawing takes two thirds of a second a page."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(Drawing, "_finished", lambda self: Markup('<svg aria-label="{}"></svg>').format(self.title))


@pytest.fixture
def folder(tmp_path):
    return lambda name, run=None, measured=None: written(tmp_path / name, run, measured)


@pytest.fixture
def three(folder):
    return [
        folder("dense", measured=evaluation({"wiki": 20.0, "c4": 31.5})),
        folder("wanda", record("wanda"), evaluation({"wiki": 40.0, "c4": 52.25})),
        folder("besa", record("besa"), evaluation({"wiki": 34.0, "c4": 50.125})),
    ]


class Page(HTMLParser):
    """What a browser would see: elements with attributes, text by element, cells by table."""

    VOID = ("meta", "link", "br")

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.tables, self.texts = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data.replace("\xa0", " ")
        if not {"style", "script"} & {*self.open}:
            self.texts.append(data.replace("\xa0", " "))

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def rows(self, number=0):
        return {row[0]: row[1:] for row in self.tables[number]}

    def table(self, *head):
        """The table whose head begins so."""
        return next(table for table in self.tables if table[0][: len(head)] == list(head))


def test_numbers_are_those_of_the_records(three):
    page = Page(render(three))
    assert page.rows()["dense"] == ["—", "20.00", "", "31.50", "", "—", "—"]
    assert page.rows()["wanda"] == ["50.00 %", "40.00", "2.00", "52.25", "1.66", "123 s", "1.23 GB"]
    assert page.rows()["besa"] == ["50.00 %", "34.00", "1.70", "50.12", "1.59", "123 s", "1.23 GB"]
    assert page.table("block", "wanda", "besa")[1] == ["0", "0.0123", "0.0123"]
    assert page.table("block", "q_proj")[1:] == [
        *([str(i), "62.50 %", "55.00 %", "35.00 %", "50.00 %"] for i in range(3)),
        ["all", "62.50 %", "55.00 %", "35.00 %", "50.00 %"],
    ]
    assert ["mean", "0.9", "0.7", "1.5"] in page.table("block", "step 1")
    rates = page.table("rate", "q_proj")
    assert rates[1:] == [  # over three blocks of 8, 4 and 10 rows
        ["24 % to 26 %", "0", "0", "6"],
        ["36 % to 38 %", "0", "0", "24"],
        ["50 % to 52 %", "0", "6", "0"],
        ["60 % to 62 %", "18", "6", "0"],
        ["70 % to 72 %", "6", "0", "0"],
    ]
    for fact in ("910,944", "600 in 3 blocks", "c4, 16 × 128 tokens, seed 7", "2026-01-05", "A processor", "ab" * 32):
        assert fact in page.text


def test_headline_is_computed(three):
    besa, wanda = three[2], three[1]
    told = "the perplexity of besa on wiki is 0.85 × that of wanda (34.00 against 40.00; dense: 20.00)."
    assert f"At exactly 50.00 % sparsity, {told}" in Page(render(three)).text
    assert "dense:" not in Page(render([wanda, besa])).text
    assert "besa on wiki is 34.00, 1.70 × that of the dense model (20.00)" in Page(render([three[0], besa])).text


def test_headline_compares_the_best_with_its_best_rival(three, folder):
    better = folder("sparsegpt", record("sparsegpt"), evaluation({"wiki": 33.0}))
    other = folder("wanda-40", record("wanda", sparsity=0.4), evaluation({"wiki": 30.0}))
    told = "the perplexity of sparsegpt on wiki is 0.97 × that of besa (33.00 against 34.00; dense: 20.00)."
    assert told in Page(render([*three, better, other])).text


def test_best_pruned_model_is_bold_at_each_sparsity(three, folder):
    others = [
        folder("wanda-70", record("wanda", sparsity=0.7), evaluation({"wiki": 90.0, "c4": 95.0})),
        folder("besa-70", record("besa", sparsity=0.7), evaluation({"wiki": 80.0, "c4": 99.0})),
    ]
    assert re.findall(r"<b>([^<]*)</b>", render(three + others)) == ["34.00", "50.12", "95.00", "80.00"]
    assert "<b>" not in render([three[0], three[2]])


def test_page_is_one_file_that_loads_nothing(drawn, three):
    html = render(three)
    page = Page(html)
    assert not page.open
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
        assert not any(name.startswith("on") for name in attributes)
    assert page.of("script") == [{}]
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in html  # no other script runs, not even one in a name
    assert not re.search(r"@import|url\((?!#)|https?:|fetch\(|XMLHttpRequest|import\(", html)
    assert "{{" not in html and "{%" not in html and "None" not in page.text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for attributes in page.of("a")] + [attributes["href"] for attributes in page.of("use")]
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_plots_follow_the_page_and_are_named(drawn, three):
    html = render(three)
    drawings = Page(html).of("svg")
    wide_and_narrow = 2
    # Perplexity, map with scale, error, rates, loss, cost, seconds.
    assert len(drawings) == 2 + 2 + wide_and_narrow + 3 + 1 + 2 + wide_and_narrow
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in drawings)
    assert "prefers-color-scheme: dark" in html and "@media print" in html
    assert not re.search(r"#0[12]0[0-9]{3}", html), "a stand-in colour is left"
    assert "<title>block 2, q_proj: 62.50\xa0%</title>" in html


def test_the_pointer_is_told_values(drawn, three):
    html = render(three).replace("\xa0", " ")
    assert "<title>besa\n34.00</title>" in html
    assert "<title>block 1\nwanda: 0.0246\nbesa: 0.0246</title>" in html
    assert "<title>rate 50 % to 52 %\nbesa: 50.0 % of the rows</title>" in html
    assert (
        "<title>learning step 2\nblock 0: 0.7\nblock 1: 0.7\nblock 2: 0.7\nmean of blocks: 0.7\n3 of 3 blocks" in html
    )


def test_the_mean_loss_is_of_the_same_blocks_at_every_step(drawn, folder):
    run = record("besa")
    for block, losses in zip(run["blocks"], ([4.0, 1.0], [8.0, 4.0, 2.0, 1.0], [9.0, 7.0, 6.0, 5.0]), strict=True):
        block["losses"] = losses
    html = render([folder("run", run)])
    assert Page(html).table("block", "step 1")[-1] == ["mean", "7", "3", "2.333"]  # the first block stays at 1
    assert "A block that stopped early counts in the mean with its last loss." in html
    assert "mean of blocks: 3\n2 of 3 blocks learning</title>" in html
    assert "stopped early" not in render([folder("other", record("besa"))])


def test_what_differs_between_runs_is_listed(three, folder):
    other = folder("other", record("wanda", seed=8, versions={"besa": "0.1.0", "torch": "2.14.0"}))
    page = Page(render([*three, other]))
    rows = {row[0]: row[1:] for row in page.table("setting", "wanda", "besa", "wanda (other)")[1:]}
    assert rows["seed"] == ["7", "7", "8"]
    assert rows["versions.torch"] == ["2.13.0", "2.13.0", "2.14.0"]
    assert rows["allocation.method"] == ["uniform", "besa", "uniform"]
    assert rows["allocation.rates"] == ["—", "row", "—"]
    stages = [name.partition(".")[0] for name in rows]
    assert stages == sorted(stages, key=stages.index) and not {"name", "versions.besa", "calibration.source"} & {*rows}
    assert "How the runs differ" not in Page(render(three[:2])).text
    assert "How the runs differ" not in Page(render([three[1], folder("same", record("wanda"))])).text


def test_same_runs_give_the_same_page(drawn, three):
    assert render(three) == render(three)


def test_names_are_not_trusted(drawn, folder):
    run = record(HOSTILE + " $x^2$ \x01 " + "long " * 10)
    run["model"] = {"source": f"</title>{HOSTILE}", "architecture": "X"}
    run["calibration"] = {"source": "<img src=x>"}
    run["command"] = ["besa", "prune", HOSTILE]
    run["blocks"][0]["linears"][0]["name"] = f"model.layers.0.{HOSTILE}"
    runs = [
        folder("run", run, evaluation({f"{HOSTILE}&": 3.0})),
        folder("dense", measured=evaluation({"t": 2.0}, model=HOSTILE)),
    ]
    html = render(runs)
    assert html.count("<script") == 1 and "<img" not in html
    assert HOSTILE in Page(html).text
    assert html.count("</title>\n<style>") == 1


def test_command_repeats_the_run(three):
    html = render(three)
    given = re.search(r"<h3>besa</h3>\s*<pre tabindex=.0.>(.*?)</pre>", html, re.DOTALL)[1]
    commands = [shlex.split(line) for line in given.replace("\\\n", "").splitlines()]
    assert " ".join(commands[0]) == (
        "OMP_NUM_THREADS=2 besa prune tiny besa --recipe besa --sparsity 0.5 --calibration c4 --samples 16 "
        "--seqlen 128 --seed 7 --dtype float32 --device cpu"
    )
    assert " ".join(commands[1]) == (
        "besa eval besa --ppl wiki --ppl c4 --window 128 --max-windows 40 --json besa/besa_eval.json"
    )
    assert "besa eval tiny --ppl wiki" in html
    assert "besa report dense wanda besa --out report.html" in html


def test_a_command_names_the_file_that_stood_for_a_test_set(folder):
    measured = evaluation({"ptb": 30.0, "c4": 40.0}, sources={"ptb": "hub", "c4": "sample.jsonl"})
    page = Page(render([folder("run", record(), measured)])).text
    assert "besa eval besa --ppl ptb --ppl c4 --data c4=sample.jsonl --window 128" in page
    assert "ptb=" not in page


def test_a_command_writes_what_the_run_wrote_on_as_many_ranks(folder):
    run = record("wanda-int4", dequantized=True, ranks=2, batch=8)
    page = Page(render([folder("two", run, evaluation({"wiki": 34.0}))])).text
    assert "torchrun --nproc-per-node 2 -m besa prune tiny" in page and "--batch 8" in page and "--dequantized" in page
    assert "besa eval" in page and "torchrun --nproc-per-node 2 -m besa eval" not in page
    run = record("wanda", ranks=8, machines=2)
    assert "torchrun --nnodes 2 --nproc-per-node 4 -m besa prune" in Page(render([folder("eight", run)])).text


def test_recipe_that_besa_does_not_ship_is_given_as_yaml(folder):
    run = record("besa", command=["besa", "prune", "a b"])
    run["recipe"]["allocation"]["epochs"] = 9
    html = render([folder("run", run)])
    assert "--recipe besa.yaml" in html and "save it as besa.yaml" in html and "besa prune &#39;a b&#39;" in html
    recipe = re.search(r"<pre tabindex=.0.>(name: .*?)</pre>", html, re.DOTALL)[1]
    assert yaml.safe_load(recipe) == run["recipe"]


def test_a_record_that_does_not_say_how_many_sequences_is_shown(folder):
    run = record("besa", recipe=Recipe.load("besa", 0.5).model_dump(mode="json"), calibration={})
    assert "--recipe besa --sparsity" in render([folder("run", run)])


@pytest.mark.parametrize(("name", "ranks"), [("besa", 1), ("best", 1), ("best", 3)])
def test_recipe_that_a_run_has_settled_is_still_one_that_besa_ships(name, ranks, folder):
    settled = Recipe.load(name, 0.5).settled(ranks, 16, {}).model_dump(mode="json")
    assert settled != Recipe.load(name, 0.5).model_dump(mode="json")
    page = render([folder("run", record(name, recipe=settled, ranks=ranks))])
    assert re.search(rf"--recipe {name}\s", page) and f"{name}.yaml" not in page


def test_distilling_has_a_curve(drawn, three, folder):
    page = render([*three, folder("far", record("wanda", distilling=DISTILLED), evaluation({"wiki": 19.0}))])
    assert 'id="distilling"' in page
    assert 'href="#distilling"' in page
    for loss in ("0.4321", "0.1234", "0.2345"):
        assert f"<td>{loss}</td>" in page
    assert 'id="distilling"' not in render(three)
    assert 'id="distilling"' not in render([folder("none", record("wanda", distilling=DISTILLED | {"losses": []}))])


def test_windows_of_different_length_are_told_and_not_compared(three, folder):
    other = folder("other", record("magnitude"), evaluation({"wiki": 22.0}, window=2048))
    page = Page(render([*three, other]))
    assert (
        "windows of different length and do not compare: 128 tokens (dense, wanda and besa); 2,048 tokens (magnitude)"
        in page.text
    )
    assert page.rows()["magnitude"] == ["50.00 %", "22.00", "", "—", "", "2,048", "123 s", "1.23 GB"]
    assert not any("Perplexity" in attributes["aria-label"] for attributes in page.of("svg"))
    assert "0.85 × that of wanda" in page.text
    assert "different" not in Page(render(three)).text


def test_a_mixture_and_dialogues_are_told_and_repeated(three, folder):
    parts = [{"source": "self", "samples": 6}, {"source": "c4", "samples": 10}]
    about = record("magnitude")["calibration"] | {"source": "self:0.4,c4:0.6", "chat": True, "parts": parts}
    page = Page(render([folder("mixed", record("magnitude", calibration=about))]))
    assert "self:0.4,c4:0.6, 16 × 128 tokens, 6 self + 10 c4, as dialogues, seed 7" in page.text
    assert "--calibration self:0.4,c4:0.6 --samples 16 --seqlen 128 --chat --seed 7" in " ".join(
        page.text.replace("\\\n", "").split()
    )
    assert "dialogues" not in Page(render(three)).text and "--chat" not in Page(render(three)).text


def test_windows_with_a_bos_token_do_not_compare_with_others(three, folder):
    details = {"wiki": {"perplexity": 22.0, "windows": 40, "predicted": 1, "bos": True}}
    measured = evaluation({"wiki": 22.0}, details=details, bos="yes")
    calibration = record("magnitude")["calibration"] | {"bos": True}
    other = folder("other", record("magnitude", calibration=calibration), measured)
    page = Page(render([*three, other]))
    assert "Windows of wiki began with a BOS token for magnitude only" in page.text
    assert page.rows()["magnitude"][2] == ""  # no ratio to dense
    assert page.text.count("--bos yes") == 2  # prune and eval
    assert "BOS" not in Page(render(three)).text and "--bos" not in Page(render(three)).text


def test_texts_of_one_name_do_not_compare_where_they_are_others(three, folder):
    told = "wiki has not the same tokens in all runs"
    begins = [{"beginnings": {"wiki": f"The city {number}"}} for number in (1, 2)]
    others = [
        folder("dense-1", measured=evaluation({"wiki": 20.0}, **begins[0])),
        folder("wanda-2", record("wanda"), evaluation({"wiki": 15.0}, **begins[1])),
        folder("besa-1", record("besa"), evaluation({"wiki": 16.0}, **begins[0])),
    ]
    page = Page(render(others))
    assert told in page.text and "Perplexity on wiki" not in page.text
    assert page.rows()["wanda"][1:3] == ["15.00", ""] and page.rows()["besa"][1:3] == ["16.00", "0.80"]
    assert "<b>" not in render(others)
    for number, run in enumerate(others):  # that begin alike, and go on otherwise
        run.measured.beginnings["wiki"] = "The city"
        run.measured.details["wiki"].sha256 = str(number % 2)
    assert Page(render(others)).rows() == page.rows()
    assert told not in Page(render([others[0], others[2]])).text
    assert told not in Page(render(three)).text  # files of before do not say


def test_runs_that_lost_different_things_are_no_rivals(folder):
    def with_experts(name, gone, value):
        mixture = {
            "name": "model.layers.0.mlp",
            "experts": 8,
            "gone": list(range(gone)),
            "scores": [1.0] * 8,
            "tokens": [9] * 8,
        }
        return folder(name, record("wanda", mixtures=[mixture], dropped=gone), evaluation({"wiki": value}))

    two, three = with_experts("two", 2, 30.0), with_experts("three", 3, 31.0)
    page = render([two, three])
    assert "<b>" not in page
    assert (
        "At exactly 50.00 % sparsity with 6 of 8 experts, the perplexity of wanda (two) on wiki is 30.00."
        in Page(page).text
    )
    depths = [
        folder(f"depth-{zeros}", record("depth", zeros=zeros, sparsity=zeros / 600), evaluation({"wiki": value}))
        for zeros, value in ((200, 25.0), (400, 29.0))
    ]
    for run in depths:
        run.record.recipe["sparsity"] = 0.1  # is not what decides
        run.record.recipe["allocation"]["blocks"] = run.record.zeros // 200
    page = render(depths)
    assert "<b>" not in page and "asked for" not in Page(page).text


def test_formats_of_measuring_are_told_and_repeated(three, folder):
    measured = evaluation({"wiki": 34.1}, dtype="bfloat16")
    other = folder("half", record("besa"), measured)
    three[2].measured.dtype = "float32"
    page = Page(render([*three, other]))
    told = "Models were measured in different formats, so small differences may be rounding: float32 (besa"
    assert told in page.text and page.text.count("--dtype bfloat16") == 1
    assert "different formats" not in Page(render(three)).text


def test_different_amounts_of_text_are_told(three, folder):
    other = folder("other", record("magnitude"), evaluation({"wiki": 22.0}, windows=10))
    assert "different amounts of wiki (40 and 10 windows of 128 tokens)" in Page(render([*three, other])).text


def test_a_missed_target_is_told_with_its_digits(folder):
    run = record("wanda", zeros=298, sparsity=0.5)
    run["sparsity"] = 298 / 600
    page = Page(render([folder("run", run)]))
    assert "wanda ended at 49.6667 % sparsity, not at the 50.00 % it was asked for." in page.text
    assert page.rows()["wanda"][0] == "49.6667 %"


def test_zeros_of_rounding_are_no_missed_target(folder):
    run = record("int4", sparsity=0.0, zeros=72)
    run["sparsity"] = 72 / 600
    page = Page(render([folder("run", run)]))
    assert "it was asked for" not in page.text
    assert page.rows()["int4"][0] == "0.00 %, 4 bits"


def test_exceptions_are_part_of_what_was_asked_for(three, folder):
    # 60 and 20 of 120 and 80 weights a block; another run met 50 %, so the two do not compete.
    run = record("wanda", zeros=240)
    run["recipe"]["sparsity_of"], run["sparsity"] = {"*.down_proj": 0.25}, 0.4
    html = render([*three, folder("fewer", run, evaluation({"wiki": 30.0}))])
    page = Page(html)
    assert page.rows()["wanda 40 %"][0] == "40.00 %"
    assert "it was asked for" not in page.text
    assert re.findall(r"<b>([^<]*)</b>", html) == ["34.00", "50.12"]
    run["zeros"], run["sparsity"] = 239, 239 / 600
    page = Page(render([folder("run", run)]))
    assert "wanda ended at 39.8333 % sparsity, not at the 40.00 % it was asked for." in page.text


def test_zeros_and_windows_of_a_command_are_those_of_the_run(folder):
    longer = {"wiki": {"perplexity": 17.5, "windows": 70, "predicted": 1}}
    measured = evaluation({"wiki": 20.0}, windows=40, other_windows={"64": longer})
    page = Page(render([folder("int4", record("besa-int4", sparsity=0.0), measured)]))
    assert "--sparsity 0.0 " in page.text
    assert "--window 128,64 --max-windows 70" in page.text


def test_differences_of_origin_are_told(three, folder):
    run = record("magnitude", versions={"besa": "0.2.0"})
    run["model"]["fingerprint"], run["calibration"]["sha256"] = "other", "other"
    runs = [*three, folder("m", run), folder("d", measured=evaluation({"wiki": 9.0}, model="elsewhere"))]
    text = Page(render(runs)).text
    assert "did not prune the same model" in text and "not calibrated on the same tokens" in text
    assert "different versions of besa: 0.1.0 and 0.2.0" in text and "measured on elsewhere" in text


def test_dequantised_model_is_told(folder):
    run = record()
    run["model"]["gguf"] = "model.Q4_1.gguf"
    assert "are dequantised" in Page(render([folder("run", run)])).text


def test_dense_alone(folder):
    page = Page(render([folder("dense", measured=evaluation({"wiki": 20.0}))]))
    assert page.rows() == {"Method": ["Sparsity", "Perplexitywiki"], "dense": ["—", "20.00"]}
    assert "The dense model has a perplexity of 20.00 on wiki." in page.text and not page.of("svg")


def test_one_run_that_was_never_measured(drawn, folder):
    page = Page(render([folder("run", record("wanda"))]))
    assert "wanda set 300 of 600 weights to zero" in page.text and "No perplexity was measured." in page.text
    assert "Learned row rates" not in page.text and "learning step" not in page.text


def test_a_run_of_few_facts(drawn, folder):
    run = record("mine", model={"source": "", "architecture": "GPT2LMHeadModel"}, calibration={}, blocks=1)
    run["peak_gpu_memory_bytes"], run["machine"]["device"] = 5_000_000, "cuda"
    page = Page(render([folder("run", run)]))
    assert "GPT2LMHeadModel" in page.text and page.rows()["mine"][-1] == "5 MB"
    assert "besa prune GPT2LMHeadModel mine --recipe mine.yaml" in page.text and "--device cuda" in page.text
    assert "OMP_NUM_THREADS" not in page.text


def test_a_run_without_blocks(folder):
    page = Page(render([folder("run", record(blocks=0, weights=0, zeros=0, sparsity=0.0) | {"blocks": []})]))
    assert "Time and memory" in page.text and "Reconstruction error" not in page.text


def test_numbers_that_are_not_finite(drawn, three, folder):
    run = record("magnitude")
    run["blocks"][1]["reconstruction_error"] = float("nan")
    broken = folder("broken", run, evaluation({"wiki": None, "c4": 1e9}))
    page = Page(render([*three, broken]))
    assert page.rows()["magnitude"][1:5] == ["∞", "", "1.00e+09", "31746031.75"]
    assert page.table("block", "wanda")[2] == ["1", "0.0246", "0.0246", "—"]


def test_pruned_model_that_lost_its_record(three, folder):
    lost = folder("lost", measured=evaluation({"wiki": 50.0}, sparsity=0.5))
    page = Page(render([*three, lost]))
    assert page.rows()["lost"][:2] == ["50.00 %", "50.00"] and "lost has no run record" in page.text


def test_labels_are_distinct(folder):
    def named(*places):
        return labels([folder(place, record(name, sparsity=sparsity)) for place, name, sparsity in places])

    assert named(("1/a", "besa", 0.5), ("1/b", "wanda", 0.5)) == ["besa", "wanda"]
    assert named(("2/a", "besa", 0.5), ("2/b", "besa", 0.7)) == ["besa 50 %", "besa 70 %"]
    assert named(("3/a", "besa", 0.5), ("3/b", "besa", 0.5)) == ["besa (a)", "besa (b)"]
    assert named(("4/a", "besa", 0.5), ("5/a", "besa", 0.5), ("5/b", "wanda", 0.5)) == [
        "besa in 4",
        "besa in 5",
        "wanda",
    ]
    run = folder("6", record())
    assert labels([run, run]) == ["besa #1", "besa #2"]
    render([run, run])


def test_experts_share_a_name_and_equal_endings_are_told_apart():
    run = record(blocks=1)
    names = ["attn.c_proj", "mlp.c_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj"]
    run["blocks"][0]["linears"] = [linear(f"model.layers.0.{name}", (4, 10), 20 + i) for i, name in enumerate(names)]
    table = parts(RunRecord.model_validate(run))
    assert list(table) == ["attn.c_proj", "mlp.c_proj", "up_proj"]
    assert (table["up_proj"][0].zeros, table["up_proj"][0].weights, sum(table["up_proj"][0].row_rates)) == (45, 80, 8)


def test_domains_have_their_mean_and_its_ratio_where_all_are_known(folder, three):
    def on_domains(*values):
        return evaluation(dict(zip(["web", "encyclopedia", "code", "technical", "languages"], values, strict=False)))

    dense = folder("d", measured=on_domains(2.0, 4.0, 8.0, 16.0, 32.0))
    besa, wanda = on_domains(4.0, 4.0, 12.0, 16.0, 32.0), on_domains(4.0, 4.0, 12.0, 16.0)
    page = Page(render([dense, folder("b", record(), besa), folder("w", record("wanda"), wanda)]))
    assert page.table("method", "sparsity", "perplexity", "÷ dense")[1:] == [
        ["dense", "—", "8.00", "—"],
        ["besa", "50.00 %", "9.97", "1.246"],  # 8 × 3^(1/5), whose ratios are 2, 1, 3/2, 1 and 1
    ]
    assert page.rows()["wanda"][5:7] == ["12.00", "1.50"]
    alone = Page(render([folder("alone", record(), besa)]))
    assert alone.table("method", "sparsity", "perplexity", "÷ dense")[1:] == [["besa", "50.00 %", "9.97", "—"]]
    assert "Geometric mean" not in Page(render(three)).text


def test_many_runs_and_blocks(drawn, folder):
    runs = [folder(str(i), record("besa", blocks=41), evaluation({"wiki": 10.0 * 3**i})) for i in range(10)]
    page = Page(render(runs))
    assert len(page.rows()) == 11 and "Logarithmic scale." in page.text


def test_speed_is_shown_where_it_was_measured(folder, three, tmp_path):
    assert "Speed and size" not in Page(render(three)).text
    (tmp_path / "besa" / "besa_bench.json").write_text(json.dumps(speeds()))
    page = Page(render([*three[:2], load_run(tmp_path / "besa")]))
    one = json.dumps(speeds()).replace('"threads": 2', '"threads": 1')
    (tmp_path / "besa" / "besa_bench.json").write_text(one)
    assert "on A processor, 1 thread, which" in Page(render([load_run(tmp_path / "besa")])).text
    assert "7 rounds on A processor, 2 threads, which reads 20.0 GB/s; × compares with dense" in page.text
    assert page.table("work")[1:] == [
        ["decode 1", "dense", "dense", "20.0", "10.0 to 40.0", "0.50", "160.0", "12 %"],
        ["decode 1", "dense", "dense, prepacked", "40.0", "20.0 to 80.0", "1.00", "160.0", "25 %"],
        ["decode 1", "packed", "sparse", "80.0", "40.0 to 160.0", "2.00", "160.0", "50 %"],
        ["prefill 64", "dense", "dense", "128.0", "128.0 to 128.0", "1.00", "6,400.0", "2 %"],
        ["prefill 64", "dense", "dense, prepacked", "128.0", "128.0 to 128.0", "1.00", "6,400.0", "2 %"],
        ["prefill 64", "packed", "sparse", "64.0", "64.0 to 64.0", "0.50", "6,400.0", "1 %"],
        *(["first token", *names, "250 ms", "250 ms to 250 ms", "1.00", "10 ms", "4 %"] for names in MODELS),
    ]
    assert page.table("model", "form", "dtype")[2] == ["dense", "dense, prepacked", "bfloat16", "200 MB", "—", "150 MB"]


def zero_shot(source="embedded", **tasks):
    found = {name: {"acc": acc, "acc_stderr": 0.0125, "questions": 200, "version": 1.0} for name, acc in tasks.items()}
    mean = sum(tasks.values()) / len(tasks)
    return {"tasks": found, "mean": mean, "source": source, "limit": 200, "lm_eval": "0.4.13"}


def test_accuracies_stand_beside_those_of_the_same_questions(folder):
    asked = zero_shot(piqa=0.62, boolq=0.5)
    dense = folder("dense", measured=evaluation({}, zero_shot=asked))
    pruned = folder("besa", record(), evaluation({"wiki": 20.0}, zero_shot=zero_shot(boolq=0.55, piqa=0.6)))
    other = folder("wanda", record("wanda"), evaluation({"wiki": 22.0}, zero_shot=zero_shot("hub", piqa=0.58)))
    page = Page(render([dense, pruned, other]))
    assert page.table("method", "sparsity", "piqa", "boolq", "mean")[1:] == [
        ["dense", "—", "62.00 ± 1.25", "50.00 ± 1.25", "56.00"],
        ["besa", "50.00 %", "60.00 ± 1.25", "55.00 ± 1.25", "57.50"],
    ]
    assert page.table("method", "sparsity", "piqa", "mean")[1:] == [["wanda", "50.00 %", "58.00 ± 1.25", "58.00"]]
    assert "the first 200 questions of each task, embedded, lm_eval 0.4.13" in page.text
    assert "besa eval wanda --ppl wiki --window 128 --max-windows 40 --tasks piqa --limit 200 --hub" in page.text
    assert "besa eval tiny --tasks piqa,boolq --limit 200 --json dense/besa_eval.json" in page.text


def answered(piqa, boolq, norm=None, source="embedded"):
    """Accuracies with the answers they are the shares of."""
    found = zero_shot(source, piqa=piqa.count("1") / len(piqa), boolq=boolq.count("1") / len(boolq))
    found["tasks"]["piqa"] |= {"right": piqa, "asked": "p"}
    found["tasks"]["boolq"] |= {"right": boolq, "asked": "b"}
    if norm:
        found["tasks"]["piqa"] |= {"acc_norm": norm.count("1") / len(norm), "right_norm": norm}
    return found


def test_accuracies_are_paired_with_those_of_dense(folder):
    dense = folder("dense", measured=evaluation({}, zero_shot=answered("1111100000", "11110", "1111100000")))
    besa = folder("besa", record(), evaluation({}, zero_shot=answered("0011110000", "11110", "1111110000")))
    plain = zero_shot(piqa=0.6, boolq=0.8)  # of before answers were kept
    wanda = folder("wanda", record("wanda"), evaluation({}, zero_shot=plain))
    hub = folder("fast", record("fast"), evaluation({}, zero_shot=answered("0000000000", "00000", source="hub")))
    page = Page(render([dense, besa, wanda, hub]))
    tables = [table for table in page.tables if table[0] == ["method", "sparsity", "piqa", "boolq", "mean"]]
    assert [len(table) for table in tables] == [4, 2]
    # Two answers lost and one won of ten: (3 - 1/10) / 9 / 10 is the square of the error.
    assert page.table("method", "piqa", "boolq", "mean")[1:] == [
        ["besa", "−10.00 ± 17.95", "+0.00 ± 0.00", "−5.00 ± 8.98"]
    ]
    assert "Accuracy less that of dense on the same questions, in points, with the paired standard error" in page.text
    assert page.table("method", "task", "questions")[1:] == [
        ["besa", "piqa", "10", "1", "2", "−10.00 ± 17.95", "+10.00 ± 10.00"],
        ["besa", "boolq", "5", "0", "0", "+0.00 ± 0.00", "—"],
    ]
    assert "Answers won and lost, by task" in page.text
    measured = evaluation({}, model="another", zero_shot=answered("1111100000", "11110", "1111100000"))
    other = folder("other", measured=measured)
    for runs in ([besa, wanda], [dense, wanda], [dense, hub], [other, besa]):
        assert "Accuracy less" not in Page(render(runs)).text
        assert "won and lost" not in Page(render(runs)).text


def test_windows_of_other_lengths_have_a_table(folder):
    details = {"wiki": {"perplexity": 20.0, "windows": 40, "predicted": 1, "bits_per_byte": 0.98765}}
    longer = {"wiki": {"perplexity": 17.5, "windows": 10, "predicted": 1}}
    run = folder("d", measured=evaluation({"wiki": 20.0}, details=details, other_windows={"512": longer}))
    page = Page(render([run]))
    assert page.table("method", "text", "window", "windows", "perplexity", "bits per byte")[1:] == [
        ["dense", "wiki", "128", "40", "20.00", "0.9877"],
        ["dense", "wiki", "512", "10", "17.50", "—"],
    ]
    assert "--window 128,512" in page.text
    assert "Other windows" not in Page(render([folder("e", measured=evaluation({"wiki": 20.0}))])).text


MODELS = [("dense", "dense"), ("dense", "dense, prepacked"), ("packed", "sparse")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds neither besa_run.json nor besa_eval.json: give a folder"),
        ({"besa_eval.json": "{}"}, r"besa_eval.json is not a besa evaluation: write it anew with `besa eval`"),
        ({"besa_eval.json": "\x00"}, r"is not a besa evaluation"),
        ({"besa_eval.json": '{"perplexity": 3, "window": 2}'}, r"is not a besa evaluation"),
        ({"besa_eval.json": '{"perplexity": {}, "window": 2}', "besa_bench.json": "{}"}, r"is not a besa measurement"),
        ({"besa_run.json": "{}"}, r"besa_run.json is not a besa run record"),
    ],
)
def test_bad_folders_are_told_in_a_sentence(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(BesaError, match=message) as told:
        load_run(tmp_path)
    assert str(told.value).endswith(".") and "\n" not in str(told.value)


def test_no_folder_and_no_runs(tmp_path):
    with pytest.raises(BesaError, match="is not a folder"):
        load_run(tmp_path / "absent")
    with pytest.raises(BesaError, match="at least one run"):
        render([])


def luminance(color):
    values = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_of_words_stand_out_from_the_page_in_both_schemes_and_on_paper():
    style = (Path(str(resources.files("besa.report"))) / "style.css").read_text()
    palettes = [dict(re.findall(r"--(\w+): (#\w+);", own)) for own in re.findall(r":root \{(.*?)\}", style, re.DOTALL)]
    assert len(palettes) == 3
    for palette in palettes:
        full = {name: c if len(c) == 7 else "#" + "".join(2 * digit for digit in c[1:]) for name, c in palette.items()}
        names = ["text", "muted", "link", *(f"s{i}" for i in range(COLORS))]
        pairs = [(full[name], full["page"], 4.5) for name in names]  # WCAG 2.2, 1.4.3 and 1.4.11
        pairs += [(full[name], full["shade"], 4.5) for name in ("text", "muted", "link")]
        pairs += [(full[name], full["page"], 3) for name in ("low", "high")]
        for color, behind, least in pairs:
            dark, light = sorted((luminance(color), luminance(behind)))
            assert (light + 0.05) / (dark + 0.05) >= least, (color, behind)
    assert {name: palettes[0][name] for name in PAGE} == PAGE


def test_the_user_s_matplotlib_style_stays_out(drawn, three):
    import matplotlib

    before = render(three)
    with matplotlib.rc_context({"axes.grid": True, "font.size": 30, "text.usetex": False, "lines.linewidth": 9}):
        assert render(three) == before
        assert matplotlib.rcParams["font.size"] == 30


def test_templates_are_part_of_the_package():
    assert (Path(str(resources.files("besa.report"))) / "template.html").is_file()


def test_simulations_get_a_section(drawn, three, tiny_llama_folder):
    assert "Simulated" not in Page(render(three)).text
    simulation = besa.simulate(tiny_llama_folder, [1, 32])
    (three[2].folder / "besa_simulation.json").write_text(simulation.model_dump_json())
    html = render([three[0], three[1], load_run(three[2].folder)])
    page = Page(html)
    assert not page.open
    assert "#simulation" in {attributes["href"] for attributes in page.of("a")}
    assert page.table("", "besa")[1:] == [
        ["published formula", "1.35 ×"],  # of a dense model: up and gate are priced too low
        ["corrected formula", "1.00 ×"],
        ["best threshold", "1.00 ×"],
        ["work bound", "1.00 ×"],
        ["with memory, 1 token", "1.00 ×"],
        ["with memory, 32 tokens", "1.00 ×"],
    ]
    block = simulation.block.cycles_corrected
    assert page.table("", "q_proj")[2][-1] == f"{block:,.1f}"
    assert page.table("block", "besa", "no zeros")[1] == ["0", f"{block:g}", f"{block:g}"]
    for label in ("Cycles", "Array on non-zeros", "Denser engine busy", "Sparser engine busy"):
        assert f'aria-label="{label} by block"' in html
    assert "besa simulate besa --tokens 1,32 --json besa/besa_simulation.json" in html


def test_an_evaluation_of_another_model_is_refused(folder):
    pruned, measured = record("wanda"), evaluation({"wiki": 40.0})
    for when in (None, pruned["created"]):
        assert folder(f"of-{when}", pruned, measured | {"pruned": when}).perplexity("wiki") == 40.0
    with pytest.raises(BesaError, match=r"other/besa_eval\.json was measured on another model: run `besa eval"):
        folder("other", pruned, measured | {"pruned": "2026-01-05T09:12:45+00:00"})


def test_a_file_that_is_no_simulation_is_refused(three):
    (three[1].folder / "besa_simulation.json").write_text("{}")
    with pytest.raises(BesaError, match="is not a besa simulation: write it anew with `besa simulate`"):
        load_run(three[1].folder)


def test_runs_compare_with_the_dense_model_that_they_were_made_of(folder):
    runs = []
    for name, dense, pruned in (("a", 20.0, 26.0), ("b", 80.0, 88.0)):
        run, digest = record("wanda" if name == "a" else "besa"), name * 64
        run["model"] |= {"source": name, "fingerprint": digest}
        runs += [
            folder(f"dense-{name}", measured=evaluation({"wiki": dense}, model=name, fingerprint=digest)),
            folder(name, run, evaluation({"wiki": pruned})),
        ]
    page = Page(render(runs))
    ratios = {row[0]: row[3] for row in page.table("Method")[1:]}
    assert [ratios["wanda"], ratios["besa"]] == ["1.30", "1.10"]
    assert "<b>" not in render(runs) and "that of wanda" not in page.text  # nor are they rivals
    alone = {row[0]: row[3] for row in Page(render(runs[1:])).table("Method")[1:]}
    assert [alone["wanda"], alone["besa"]] == ["", "1.10"]  # without its own dense model, nothing is divided


def test_bits_and_patterns_are_told_and_do_not_compare(folder):
    fours, pairs = record("besa-int4"), record("wanda")
    pairs["recipe"]["allocation"] = {"method": "nm", "keep": 2, "of": 4}
    runs = [
        folder("plain", record("magnitude"), evaluation({"wiki": 30.0})),
        folder("fours", fours, evaluation({"wiki": 31.0})),
        folder("pairs", pairs, evaluation({"wiki": 32.0})),
    ]
    html = render(runs)
    assert "<b>" not in html
    assert [row[1] for row in Page(html).table("Method")[1:]] == ["50.00 %", "50.00 %, 4 bits", "50.00 %, 2:4"]
    assert "At exactly 50.00 % sparsity with 4 bits, the" in Page(render(runs[1:2])).text


def test_what_a_run_and_a_measurement_said_is_on_the_page(folder):
    run = record("wanda", notes=["The run was begun with 2 threads."])
    page = Page(render([folder("run", run, evaluation({"wiki": 30.0}, notes=["It was calibrated on wiki."]))])).text
    assert "wanda: The run was begun with 2 threads." in page and "wanda: It was calibrated on wiki." in page


def test_what_was_packed_or_shrunk_since_is_told_and_done_again(folder):
    config = {"besa": {"sparsity": 0.5, "head": "int8", "shrunk": {}}, "dtype": "bfloat16"}
    packed = {"quant_method": "besa", "format": FORMAT, "version": VERSION}
    path = folder("run", record("wanda"), evaluation({"wiki": 30.0})).folder
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": packed}))
    page = Page(render([load_run(path)])).text
    assert "wanda is shrunk, packed, with head and embeddings in int8: sparsity and matrices are those before" in page
    assert "besa prune tiny wanda-pruned --recipe" in page
    assert "besa shrink wanda-pruned wanda-pruned-1 --by-block" in page
    assert "besa pack wanda-pruned-1 wanda --head int8 --dtype bfloat16" in page
    (path / "config.json").write_text(json.dumps({"besa": {"head": "int8"}, "dtype": "float32"}))
    page = Page(render([load_run(path)])).text
    assert "besa pack wanda-pruned wanda-pruned-1 --head int8" in page and "besa unpack wanda-pruned-1 wanda" in page


def test_a_result_of_other_files_is_refused(three, tiny_llama_folder, tmp_path):
    shutil.copytree(tiny_llama_folder, tmp_path / "tiny")
    simulation = besa.simulate(tmp_path / "tiny", [1])
    (tmp_path / "tiny" / "besa_eval.json").write_text(json.dumps(evaluation({"wiki": 9.0})))
    (tmp_path / "tiny" / "besa_simulation.json").write_text(simulation.model_dump_json())
    assert load_run(tmp_path / "tiny").simulated.fingerprint == simulation.fingerprint
    other = simulation.model_copy(update={"fingerprint": "0" * 64})
    (tmp_path / "tiny" / "besa_simulation.json").write_text(other.model_dump_json())
    with pytest.raises(BesaError, match=r"simulation\.json was simulated on another model: run `besa simulate"):
        load_run(tmp_path / "tiny")
    (tmp_path / "tiny" / "besa_simulation.json").unlink()
    measured = evaluation({"wiki": 9.0}, fingerprint="0" * 64)
    (tmp_path / "tiny" / "besa_eval.json").write_text(json.dumps(measured))
    with pytest.raises(BesaError, match=r"eval\.json was measured on another model"):
        load_run(tmp_path / "tiny")


def test_infinite_perplexities_are_told_and_nothing_is_divided_by_them(drawn, folder):
    dense = folder("dense", measured=evaluation({"wiki": math.inf}))
    wanda = folder("wanda", record("wanda"), evaluation({"wiki": 40.0}))
    page = Page(render([dense, wanda]))
    assert "the perplexity of wanda on wiki is 40.00." in page.text and "0.00 ×" not in page.text
    assert page.table("Method")[0][3] != "÷ dense"
    endless = folder("endless", record("magnitude"), evaluation({"wiki": math.inf}))
    assert "The perplexity of magnitude on wiki is infinite." in Page(render([endless])).text


def test_folders_in_commands_are_distinct(folder):
    runs = [folder(name, record("besa"), evaluation({"wiki": 40.0})) for name in ("run_1", "run-1", "日本", "中国")]
    page = Page(render(runs)).text
    (again,) = re.findall("besa report (.*) --out report.html", page)
    assert len(set(again.split())) == 4
    assert all(f"besa prune tiny {name} --recipe" in page for name in again.split())
