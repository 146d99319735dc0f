"""What of the code a result depends on: a change of any such module makes it older, a change of words does not."""

import json
import shutil
from pathlib import Path

import pytest

from besa.methods.recipe import Recipe
from experiments import readme
from experiments.age import code_of, commit, digest
from experiments.readme import OTHERS, with_results
from experiments.result import OLDER, Result

ROOT = Path(__file__).parent.parent.parent
BESA, WANDA, FAST = (Recipe.load(name) for name in ("besa", "wanda", "fast"))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The code of besa and of the experiments, to change."""
    root = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__", "results", "*.so", "*.json", "*.gz")
    shutil.copytree(ROOT / "src" / "besa", root / "src" / "besa", ignore=ignored)
    shutil.copytree(ROOT / "experiments", root / "experiments", ignore=ignored)
    return root


def edited(root: Path, file: str, before: str, after: str) -> None:
    path = root / file
    text = path.read_text(encoding="utf-8")
    assert before in text, file
    path.write_text(text.replace(before, after, 1), encoding="utf-8")


def result(**fields: object) -> Result:
    settings = {"besa": BESA.model_dump(mode="json")}
    given = {"created": "2026-11-27", "experiment": "table1", "settings": settings}
    return Result.model_validate(given | {"code": code_of([BESA], "table1")} | fields)


CHANGES = {
    "src/besa/pruning/step.py": ("import ", "import json\nimport ", "pruning"),
    "src/besa/methods/allocation/besa.py": ("ge=0.001", "ge=0.002", "methods"),
    "src/besa/methods/recipes/besa.yaml": ("steps: 88", "steps: 64", "recipes"),
    "src/besa/kernels/masks.cpp": ("return", "return  0 +", "kernels"),
    "src/besa/evaluation/perplexity.py": ("return", "pass\n        return", "evaluation"),
    "experiments/table1.py": ("most=0", "most=1", "experiments"),
    "experiments/settings.py": ("plain=1", "plain=0", "experiments"),
    "experiments/judging.py": ("CONFIDENCE = 0.95", "CONFIDENCE = 0.9", "experiments"),
}


def test_a_module_that_changes_makes_results_older(copy: Path) -> None:
    for file, (before, after, _) in CHANGES.items():
        if file.endswith("perplexity.py"):
            before, after = (
                "def check_window(",
                "def check_window_(\n    x: int,\n) -> None: ...\n\n\ndef check_window(",
            )
        edited(copy, file, before, after)
    rooms = {room for *_, room in CHANGES.values()}
    assert set(result().older(copy)) == rooms
    assert result().older() == []


def test_words_and_other_methods_make_no_result_older(copy: Path) -> None:
    """Docstrings, comments, messages, descriptions; a method that no recipe of the result names; what only shows."""
    before = code_of([BESA], "table1")
    edited(copy, "src/besa/methods/allocation/besa.py", '"""BESA: learn', '"""BESA: find')
    edited(copy, "src/besa/methods/allocation/besa.py", "one rate for each row, or for each linear", "which")
    edited(copy, "src/besa/methods/allocation/besa.py", "OPTIMIZER = 7  #", "OPTIMIZER = 7  # so many:")
    edited(copy, "src/besa/data/calibration.py", "raise BesaError(", 'raise BesaError("Alas. "')
    edited(copy, "src/besa/methods/reconstruction/admm.py", "import ", "import json\nimport ")
    edited(copy, "src/besa/cli/tables.py", "import ", "import json\nimport ")
    edited(copy, "src/besa/kernels/masks.cpp", "return", "/* so */  return")
    edited(copy, "src/besa/kernels/tiles.cpp", "return", "return  0 +")  # which packed models alone run
    (copy / "src/besa/methods/importance/another.py").write_text("x = 1\n")
    union = copy / "src/besa/methods/importance/__init__.py"
    union.write_text(union.read_text(encoding="utf-8") + "\nfrom besa.methods.importance import another\n")
    assert code_of([BESA], "table1", copy) == before
    assert code_of([FAST], None, copy) != code_of([FAST])  # which solves for masks and weights


def test_runs_depend_on_less_than_results() -> None:
    run, made = code_of([BESA, None]), code_of([BESA], "table1")
    assert run.items() < made.items()
    assert made.keys() - run.keys() == {"experiments", "recipes"}
    assert code_of([WANDA])["methods"] != run["methods"]
    assert len(digest(run)) == 12
    assert "simulator" in code_of([BESA], "table4") and "simulator" not in made
    assert commit(Path("/")) == ""


def test_a_result_without_digests_or_of_other_settings_is_older() -> None:
    assert result(code={}).older() == ["all"]
    assert result(settings={"besa": {"name": "besa", "gone": 1}}).older() == ["methods"]
    assert result(code=result().code | {"storage": "0"}).older() == ["storage"]


def test_a_page_must_say_that_a_figure_is_older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page that `with_results` would write is another one, so that the test of the real pages fails."""
    made = result(
        name="table1", commit="abc12345", versions={"besa": "0.2.0"}, machine={"processor": "A", "threads": 1}
    )
    place, page = tmp_path / "results" / "table1", tmp_path / "page.md"
    place.mkdir(parents=True)
    (place / "table1.md").write_text("# Table 1\n\n| a |\n|---|\n| 1 |\n\nwords\n")
    (place / "table1.json").write_text(made.model_dump_json())
    page.write_text("<!-- results:table1/table1 -->\n<!-- /results -->\n")
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "results")
    page.write_text(with_results(page))
    assert "| 1 |\n\nMade by besa 0.2.0 at commit abc12345 on A, 1 thread, 2026-11-27.\n<!--" in page.read_text()
    assert with_results(page) == page.read_text()
    (place / "table1.json").write_text(made.model_copy(update={"code": made.code | {"pruning": "0"}}).model_dump_json())
    assert with_results(page) != page.read_text()
    assert f"2026-11-27; {OLDER}.\n" in with_results(page)


def test_every_result_of_the_project_says_what_made_it() -> None:
    files = [path for path in (ROOT / "experiments" / "results").glob("*/*.json") if path.stem == path.parent.name]
    assert len(files) >= 20
    index = readme.index()
    assert OTHERS in index
    for file in files:
        made = Result.read(file)
        assert made.commit and made.versions["besa"] and made.experiment, file
        assert json.loads(file.read_text())["created"][:10] in made.note
        assert f"[{file.stem}]({file.stem}/{file.stem}.md)" in index
        assert made.note in index
