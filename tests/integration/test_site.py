"""The documentation as a site: it builds without a warning, and what it loads is its own and is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import besa

pytest.importorskip("mkdocstrings_handlers.python")  # the extra `docs`, which `make setup` installs

ROOT = Path(__file__).parents[2]
# What a browser fetches by itself: not links, which the reader follows.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed|object)\b[^>]*?\b(?:src|data)=["']?([^"'\s>]+)"""
)
LINKED = re.compile(r"<link\b[^>]*>")
IN_STYLES = re.compile(r"""url\(["']?([^"')]+)|@import\s+["']([^"']+)""")
ELSEWHERE = re.compile(r"^(?:\w+:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


def fetched(file: Path) -> list[str]:
    """The addresses that a browser fetches for a page, a style or a picture."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".html":
        links = [link for link in LINKED.findall(text) if 'rel="canonical"' not in link]
        styles = re.findall(r"<style.*?</style>", text, re.DOTALL)
        hrefs = [found for link in links for found in re.findall(r"""href=["']?([^"'\s>]+)""", link)]
        return [*FETCHED.findall(text), *hrefs, *(found for style in styles for found in in_styles(style))]
    return in_styles(text)


def in_styles(text: str) -> list[str]:
    return [address for pair in IN_STYLES.findall(text) for address in pair if address]


def test_what_is_loaded_is_there_and_not_elsewhere(site: Path) -> None:
    files = [file for suffix in ("html", "css", "svg") for file in site.rglob(f"*.{suffix}")]
    addresses = {(file.parent, address.partition("?")[0]) for file in files for address in fetched(file)}
    assert len(files) > 40
    for suffix in (".css", ".js", ".png", ".svg"):
        assert any(address.endswith(suffix) for _, address in addresses)
    assert not [each for each in addresses if ELSEWHERE.match(each[1])]
    local = [(folder, address) for folder, address in addresses if not address.startswith(("data:", "#"))]
    assert not [(folder, address) for folder, address in local if not (folder / address.lstrip("/")).is_file()]


@pytest.mark.parametrize(
    "text",
    [
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css">',
        '<script async src="//unpkg.com/x.js"></script>',
        "<img alt='' src='http://x.org/y.png'>",
        "<style>@font-face {src: url(https://x.org/f.woff2)}</style>",
    ],
)
def test_what_would_be_loaded_is_seen(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<head>{text}</head>")
    assert any(ELSEWHERE.match(address) for address in fetched(page))


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    reference = (site / "reference.html").read_text(encoding="utf-8")
    for name in besa.__all__:
        assert name == "__version__" or f'id="besa.{name}"' in reference, name


def test_equations_lead_to_their_functions(site: Path) -> None:
    method = (site / "method.html").read_text(encoding="utf-8")
    functions = (site / "functions.html").read_text(encoding="utf-8")
    anchors = set(re.findall(r'href="functions\.html#(besa\.[\w.]+)"', method))
    assert len(anchors) >= 15
    for anchor in anchors:
        assert f'id="{anchor}"' in functions


def test_examples_are_shown_and_links_out_of_docs_lead_to_pages(site: Path) -> None:
    page = re.sub(r"<[^>]+>", "", (site / "examples.html").read_text(encoding="utf-8"))
    assert "class Noisy(Criterion):" in page
    assert page.count("def main(") == 6
    assert 'href="benchmarks/index.html#memory"' in (site / "your-model.html").read_text(encoding="utf-8")
    runs = (site / "experiments/results/beyond/zero-shot/index.html").read_text(encoding="utf-8")
    assert 'href="best.json"' in runs
    assert (site / "experiments/results/beyond/zero-shot/best.json").is_file()
