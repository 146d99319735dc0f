"""The README and the pages of docs/ say only what is there."""

import importlib.util
import itertools
import re
import shlex
import tomllib
import typing
from pathlib import Path

import pytest
import typer.testing

from besa.cli import app
from besa.methods.recipe import Recipe
from besa.methods.shipped import shipped
from experiments.readme import MARKED, PAGES, RESULTS, WRITTEN, index, runs, with_results

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
DOCS = [
    README,
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "README.md",
    RESULTS / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


def besa_commands() -> list[list[str]]:
    """The arguments of every besa command in a shell block."""
    lines = [line for page in DOCS for body in blocks(page, "sh") for line in body.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("besa ")]


def anchors(page: Path) -> set[str]:
    """What links to sections of a page end with, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    documented = re.findall(r"^::: (\S+)$", text_of(page), re.MULTILINE)  # on the site; on GitHub the page opens
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles} | set(documented)


@pytest.mark.parametrize(
    ("page", "results"), list(zip(PAGES, (2, 8, 3), strict=True)), ids=["README.md", "results.md", "recipes.md"]
)
def test_result_tables_are_the_measured_ones(page: Path, results: int) -> None:
    text = text_of(page)
    assert with_results(page) == text
    assert text.count("<!-- results:") == text.count("<!-- /results -->") == len(re.findall(MARKED, text)) == results


def test_results_are_those_of_the_experiments() -> None:
    for name, make in WRITTEN.items():
        assert text_of(RESULTS / f"{name}.md") == make()
    assert runs("50") in text_of(RESULTS / "50.md")
    assert runs("70") in text_of(RESULTS / "70.md")


def test_results_say_which_besa_on_which_machine_made_them() -> None:
    lines = [line for line in index().splitlines() if line.startswith("| [")]
    assert len(lines) > 20
    for line in lines:
        assert re.search(r"besa \d+\.\d+\.\d+ at commit .* on (AMD|Intel).*, \d threads?, 20\d\d-\d\d-\d\d", line), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_of_figures_says_what_made_it(page: Path) -> None:
    """It is made from results, with a line on them, or its section has a version or a date."""
    by_hand = re.sub(MARKED, "", text_of(page))
    for section in re.split(r"^(?=#+ )", by_hand, flags=re.MULTILINE):
        if re.search(r"^\|.*\d\.\d", section, re.MULTILINE):
            assert re.search(r"\b0\.\d+\.\d\b|20\d\d-\d\d-\d\d", section), section.splitlines()[0]
    for name, shown in [(match[2], match[0]) for match in re.finditer(MARKED, text_of(page))]:
        assert name == "forms" or re.search(r"besa \d\.\d\.\d.* at commit .*, 20\d\d-\d\d-\d\d", shown), name


@pytest.mark.parametrize("page", [*DOCS, ROOT / "CONTRIBUTING.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_sections(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not link.startswith("http"):
            name, _, section = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not section or section in anchors(target), link


def test_readme_is_short_and_its_make_commands_are_targets() -> None:
    assert len(text_of(README).splitlines()) <= 180
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    commands = re.findall(r"^make (\S+)", "\n".join(blocks(README, "sh")), re.MULTILINE)
    assert commands == ["demo", "test"]
    assert targets.issuperset(commands)


def test_commands_parse_as_written() -> None:
    commands = besa_commands()
    assert len(commands) >= 20
    runner = typer.testing.CliRunner()
    for arguments in commands:
        # --help is eager, so nothing runs; unknown commands and options are still refused.
        known = runner.invoke(app, [arguments[0], "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert known.exit_code == 0
        for option in (word for word in arguments if word.startswith("--")):
            assert option in known.output, (arguments, option)


def test_recipes_and_settings_of_commands_exist() -> None:
    changed = 0
    for arguments in besa_commands():
        given = list(itertools.pairwise(arguments))
        (name,) = [value for option, value in given if option == "--recipe"] or ["besa"]
        settings = [value for option, value in given if option == "--set"]
        Recipe.load(name, overrides=settings)
        changed += len(settings)
    assert changed
    for page in DOCS:
        for name in re.findall(r"--recipe ([\w-]+)(?![\w.-])", text_of(page)):
            assert name in shipped(), (page, name)


def test_modules_of_commands_exist() -> None:
    pattern = r"python -m ((?:besa|benchmarks|experiments)(?:\.\w+)*)"
    modules = {name for page in DOCS for name in re.findall(pattern, text_of(page))}
    assert modules
    for name in modules:
        assert importlib.util.find_spec(name), name


@pytest.mark.parametrize(
    "stage", ["experts", "targets", "importance", "allocation", "reconstruction", "finetune", "distill", "quantization"]
)
def test_table_of_stages_lists_every_method(stage: str) -> None:
    lines = text_of(ROOT / "docs" / "architecture.md").splitlines()
    listed = re.findall(r"`([\w-]+)`", next(line for line in lines if line.startswith(f"| {stage} ")))
    choices = typing.get_args(Recipe.model_fields[stage].annotation)
    assert sorted(listed) == sorted(choice.model_fields["method"].default for choice in choices)


def test_python_examples_are_valid_and_use_public_names() -> None:
    import besa

    examples = [body for page in DOCS for body in blocks(page, "python")]
    assert any("besa.compress(" in example for example in examples)
    for example in examples:
        compile(example, "example", "exec")
        for name in re.findall(r"besa\.(\w+)", example):
            assert name in besa.__all__


def test_pins_satisfy_the_ranges() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for text in project["dependencies"] + [
        *project["optional-dependencies"]["dev"],
        *project["optional-dependencies"]["docs"],
    ]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), text
