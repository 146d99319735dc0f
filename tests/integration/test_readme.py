"""The README says only what is there."""

import re
import shlex
import tomllib
from pathlib import Path

import typer.testing

from besa.cli import app
from experiments.readme import MARKED, RESULTS, past, with_results

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)


def test_result_tables_are_the_measured_ones() -> None:
    assert with_results(TEXT) == TEXT
    assert TEXT.count("<!-- results:") == TEXT.count("<!-- /results -->") == len(re.findall(MARKED, TEXT)) == 6
    assert (RESULTS / "past.md").read_text(encoding="utf-8") == past()


def test_links_lead_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_make_commands_are_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = re.findall(
        r"^make (\S+)", "\n".join(body for language, body in BLOCKS if language == "sh"), re.MULTILINE
    )
    assert commands == ["demo", "test"]
    assert targets.issuperset(commands)


def test_commands_parse_as_written() -> None:
    lines = [line for language, body in BLOCKS if language == "sh" for line in body.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("besa ")]
    assert len(commands) >= 5
    runner = typer.testing.CliRunner()
    for arguments in commands:
        # --help is eager, so nothing runs; unknown commands and options are still refused.
        known = runner.invoke(app, [arguments[0], "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert known.exit_code == 0
        for option in (word for word in arguments if word.startswith("--")):
            assert option in known.output, (arguments, option)


def test_recipes_and_choices_of_the_tables_exist() -> None:
    from besa.recipe import Recipe, shipped

    table = TEXT[TEXT.index("## Every method is a few choices") :]
    rows = {"targets": 4, "importance": 3, "allocation": 5, "reconstruction": 4, "finetune": 2}
    for row, choices in rows.items():
        line = next(line for line in table.splitlines() if line.startswith(f"| {row} "))
        methods = re.findall(r"`([\w-]+)`", line)
        assert len(methods) == choices
        for method in methods:
            Recipe.model_validate({row: {"method": method}})
    for name in re.findall(r"--recipe (\w+)(?= )", TEXT):
        assert name in shipped()


def test_python_example_is_valid_and_uses_public_names() -> None:
    import besa

    (example,) = [body for language, body in BLOCKS if language == "python"]
    compile(example, "README.md", "exec")
    for name in re.findall(r"besa\.(\w+)\(", example):
        assert name in besa.__all__


def test_pins_satisfy_the_ranges() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), text
