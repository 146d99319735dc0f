"""Runs of a workspace, shared among ranks: one rank does each run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from besa.errors import BesaError
from besa.methods.recipe import Recipe
from besa.storage.writing import LOCK, taken
from besa.studies.leftovers import drop_marks
from besa.studies.origin import Origin
from besa.studies.workspace import Workspace
from besa.system import ranks

FAILED = "besa.failed"  # name of the file that tells the other ranks to begin nothing more


def tidy(folder: Path) -> None:
    """Remove the locks and marks that killed processes have left; the caller has the folder to itself."""
    for path in (*folder.glob(f"*.{LOCK}"), folder / FAILED):
        path.unlink(missing_ok=True)
    drop_marks(folder)


def check_alike(origin: Origin) -> None:
    """Check that all ranks make results of one origin.

    Raises:
        BesaError: two of them differ in versions or machine.
    """
    origins = [Origin.model_validate(one) for one in ranks.all_of(origin.model_dump(mode="json"))]
    other = next((rank for rank, one in enumerate(origins) if one != origins[0]), None)
    if other is not None:
        raise BesaError(
            f"Ranks 0 and {other} would make results that do not compare ({origins[0].label}; {origins[other].label}): "
            "compare with ranks on machines of one kind."
        )


def share_out(workspace: Workspace, runs: Sequence[tuple[Recipe | None, int]]) -> None:
    """Do the missing runs. Each rank takes the next run that no rank has done or begun, until all are done.

    Args:
        workspace: its folder exists and is the same on all ranks.
        runs: recipes (None: the dense model) and seeds.

    Raises:
        BesaError: the ranks do not share the folder, or a run failed; on all ranks, as soon as those in work are done.
    """
    folder, problem = workspace.folder, ""
    seen = ranks.all_of((folder / LOCK).exists())  # rank 0 has claimed it
    if not all(seen):
        raise BesaError(f"Rank {seen.index(False)} does not see {folder}: choose an --out that all machines share.")
    for recipe, seed in runs:
        if problem or (folder / FAILED).exists():
            break
        if workspace.done(recipe, seed):
            continue
        try:
            with taken(folder / f"{workspace.key(recipe, seed)}.{LOCK}") as mine, ranks.alone():
                if mine and not workspace.done(recipe, seed):
                    workspace.outcome(recipe, seed)
        except BesaError as error:
            problem = str(error)
            with suppress(OSError):  # on a full disk, the others find out by themselves
                (folder / FAILED).touch()
    problem = next(filter(None, ranks.all_of(problem)), "")
    if ranks.is_first():
        (folder / FAILED).unlink(missing_ok=True)
    if problem:
        raise BesaError(problem)
