"""What of the code a result depends on, as a digest of each room that wording does not change; and the commit.

A result depends on what `besa.compress` and `besa.evaluate` import, directly or through others, and on its experiment's
own module. Rooms that only show, plan or keep results do not count (`SILENT`). Of the methods, only those count that a
recipe of the result names, with the file of that recipe: a new method makes no result older. Of the kernels in C++,
only those count that such modules name: the products of packed models touch no result.

Of each module the syntax tree counts, without docstrings, comments, messages of errors and descriptions of settings.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from besa.kernels.build import assembled
from besa.methods.recipe import Recipe

ROOT = Path(__file__).parent.parent
RUN = ("besa.api.compressing", "besa.api.evaluating")
SILENT = (
    "besa.checkpoint.card_text", "besa.checkpoint.cards", "besa.cli", "besa.doctor", "besa.errors", "besa.integrations",
    "besa.planning", "besa.progress", "besa.record", "besa.report", "besa.studies", "besa.version",
)  # fmt: skip
STAGES = ("allocation", "distilling", "dropping", "finetuning", "importance", "reconstruction", "targets")
UNIONS = tuple(f"besa.methods.{stage}" for stage in STAGES)  # their `__init__` lists all methods of a stage
SHOWING = ("experiments", "experiments.experiment")  # what an experiment is made of; its runs are in its recipes
RECIPES = "recipes"
Code = dict[str, str]


def code_of(recipes: Iterable[Recipe | None], module: str | None = None, root: Path = ROOT) -> Code:
    """Digests by room of the modules that results of these recipes depend on.

    Args:
        recipes: that were run; None stands for the dense model.
        module: of the experiment, where more than its runs count.
        root: of the project.
    """
    chosen = [recipe for recipe in recipes if recipe is not None]
    methods = {type(choice).__module__ for recipe in chosen for _, choice in recipe if hasattr(choice, "method")}
    modules = _closure(frozenset({*RUN, *methods}), root, SILENT)
    if module is not None:
        modules |= _closure(frozenset({f"experiments.{module}", "experiments.settings"}), root, SILENT)
    rooms: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(modules):
        rooms.setdefault(_room(name), []).append((name, _digest_of(_file(name, root))))
    rooms["kernels"] += _sources(modules, root)
    shipped = root / "src" / "besa" / "methods" / RECIPES
    files = {path for recipe in chosen if (path := shipped / f"{recipe.name}.yaml").is_file()}
    if module is not None and files:
        rooms[RECIPES] = [(path.stem, _hashed(yaml.safe_load(path.read_text("utf-8")))) for path in sorted(files)]
    return {room: _hashed(parts)[:12] for room, parts in sorted(rooms.items())}


def changed(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The rooms whose code is not what it was; all where a result does not say what made it."""
    return [room for room in sorted({*then, *now}) if then.get(room) != now.get(room)]


def digest(content: Any) -> str:
    """A short name for content in types of JSON."""
    return _hashed(content)[:12]


def commit(root: Path = ROOT) -> str:
    """The commit at work, with a plus if files of besa or of the experiments differ from it; empty without git."""

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return found.stdout.strip()

    try:
        code = ("src", ":(glob)experiments/*.py")
        return git("rev-parse", "--short=8", "HEAD") + ("+" if git("status", "--porcelain", "--", *code) else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


@cache
def _closure(roots: frozenset[str], root: Path, skipped: tuple[str, ...]) -> frozenset[str]:
    """Modules that these import, directly or through others, and themselves."""
    found: set[str] = set()
    left = list(roots)
    while left:
        name = left.pop()
        passed = any(name == one or name.startswith(f"{one}.") for one in skipped)
        if name in found or passed or name in ("besa", *UNIONS, *SHOWING):
            continue
        if _file(name, root) is not None:
            found.add(name)
            left += _imports(name, root)
    return frozenset(found)


@cache
def _imports(name: str, root: Path) -> frozenset[str]:
    """The modules that a module takes names from, in functions too, but not for types alone."""
    found = set()
    nodes: list[ast.AST] = [_tree(_file(name, root))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {_home(node.module, alias.name, root) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        nodes += ast.iter_child_nodes(node)
    return frozenset(found)


def _home(module: str, name: str, root: Path) -> str:
    """Where a name comes from that is imported from a module, past packages that only pass it on."""
    if _file(f"{module}.{name}", root) is not None:
        return f"{module}.{name}"
    path = _file(module, root)
    if path is not None and path.name == "__init__.py":
        for node in _tree(path).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return _home(node.module, alias.name, root)
    return module


@cache
def _file(module: str, root: Path) -> Path | None:
    """The file of a module of besa or of the experiments; None for others."""
    top = module.partition(".")[0]
    if top not in ("besa", "experiments"):
        return None
    path = (root / "src" if top == "besa" else root).joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _digest_of(path: Path) -> str:
    return _hashed(_plain(_tree(path)))


def _plain(node: Any) -> Any:
    """A syntax tree as nested lists, without what changes no number; the same for every version of Python."""
    if isinstance(node, list):
        return [_plain(one) for one in node if not _wording(one)]
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return ["Raise", _plain(node.exc.func)]
    fields = [(field, getattr(node, field, None)) for field in node._fields if field not in ("ctx", "kind")]
    return [type(node).__name__, *([field, _plain(value)] for field, value in fields if value not in (None, []))]


def _wording(node: Any) -> bool:
    """A docstring, or the description of a setting."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return isinstance(node, ast.keyword) and node.arg == "description"


def _sources(modules: Iterable[str], root: Path) -> list[tuple[str, str]]:
    """Digests of the C++ files of kernels that modules name, with those that they include in their places."""
    folder = root / "src" / "besa" / "kernels"
    named = set().union(*(_strings(_file(module, root)) for module in modules))
    found = [name for name in sorted(named) if name.endswith(".cpp") and (folder / name).is_file()]
    return [(name, _hashed(_words(assembled(name, folder).decode()))) for name in found]


@cache
def _strings(path: Path) -> frozenset[str]:
    """The strings that stand in a module."""
    nodes = (node for node in ast.walk(_tree(path)) if isinstance(node, ast.Constant))
    return frozenset(node.value for node in nodes if isinstance(node.value, str))


def _words(source: str) -> str:
    """C++ without comments, its white space alike."""
    return " ".join(re.sub(r"//[^\n]*|/\*.*?\*/", " ", source, flags=re.DOTALL).split())


def _room(module: str) -> str:
    """`methods` of besa.methods.recipe, `experiments` of all experiments."""
    top, *rest = module.split(".")
    return rest[0] if top == "besa" else top


def _hashed(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
