"""Whether newer code still makes results: it and the code before make all their cells small, equal to the digit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from besa.errors import BesaError
from besa.record import now
from experiments.age import ROOT, code_of, commit
from experiments.items import TINY, Item
from experiments.result import Result
from experiments.writing import rewrite


def confirm(items: Sequence[Item], results: Path, before: str, folder: Path) -> list[str]:
    """Compare the code of a commit with the present code, and confirm the results that the commit's code makes.

    Both make all cells of the results on the tests' model, on this machine. A result whose cells are equal to the digit
    gets the digests of the present code.

    Args:
        items: the results; those that are not older than the code are left as they are.
        results: folder of their files.
        before: the commit.
        folder: for the runs.

    Returns:
        What was found of each, in a sentence.

    Raises:
        BesaError: there is no such commit, none of the results is of its code, or its runs fail.
    """
    with _checked_out(before) as root:
        files = {item: results / item.name / f"{item.name}.json" for item in items}
        read = {item: Result.read(file) for item, file in files.items() if file.exists()}
        older = [item for item, result in read.items() if result.older() and not result.older(root)]
        if not older:
            raise BesaError(f"None of these results is older than the present code and of the code of commit {before}.")
        names = sorted({_small(item).name for item in older})
        then, present = _made(names, root, folder / "before"), _made(names, ROOT, folder / "present")
    found = []
    for item in older:
        values, cells = (_values(made / _small(item).name / f"{_small(item).name}.json") for made in (then, present))
        if values != cells:
            apart = [label for label in {**values, **cells} if values.get(label) != cells.get(label)]
            found.append(f"{item.name}: not as of commit {before}: {', '.join(apart)}; make the whole result again.")
            continue
        words = f"made {len(cells)} cases of it on the tests' model, equal to the digit to those of commit {before}"
        _stamp(item, results / item.name, words)
        found.append(f"{item.name}: {len(cells)} cases are equal to the digit; the result is confirmed.")
    return found


def _small(item: Item) -> Item:
    """The same result of the tests' model."""
    return replace(item, model=str(TINY))


@contextmanager
def _checked_out(before: str) -> Iterator[Path]:
    """The files of a commit, in a folder of their own.

    Raises:
        BesaError: there is no such commit.
    """

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(ROOT), "worktree", *arguments], check=True, capture_output=True)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "before"
        try:
            git("add", "--detach", str(root), before)
        except (OSError, subprocess.CalledProcessError):
            raise BesaError(f"git finds no commit {before}: name one whose code made the results.") from None
        try:
            yield root
        finally:
            git("remove", "--force", str(root))


def _made(names: Sequence[str], root: Path, work: Path) -> Path:
    """The folder of small results that the code of a checkout makes.

    Raises:
        BesaError: it fails.
    """
    chosen = [argument for name in names for argument in ("--only", name)]
    path = os.pathsep.join((str(root / "src"), str(root)))
    command = [sys.executable, "-P", "-m", "experiments.all", "--small", "--work", str(work), *chosen]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL, check=False)
    if ended.returncode:
        raise BesaError(f"The code in {root} cannot make the results small: see above.")
    return work / "results"


def _values(file: Path) -> dict[str, object]:
    """Of each case its recipe, and what is counted and measured, by seed.

    The recipe counts, as a setting may matter only to models larger than that of the tests. Settings that came since
    are at their defaults.
    """
    result = Result.read(file)
    recipes = dict(zip(result.settings, result.recipes, strict=True))
    return {row["recipe"]: (recipes.get(row["recipe"]), row["sparsity"], row["values"]) for row in result.rows}


def _stamp(item: Item, folder: Path, words: str) -> None:
    """Give a result the digests of the present code, and say why."""
    file = folder / f"{item.name}.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["code"] = code_of(Result.read(file).recipes, item.module)
    content["confirmed"].append({"commit": commit(), "date": now(), "found": words})
    rewrite(content, folder)
