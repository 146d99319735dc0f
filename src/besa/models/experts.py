"""Mixtures of experts in a block: which modules hold experts, and which linears choose among them.

Shape suffixes: E experts, O rows (output channels), I columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ROUTER_NAMES = ("router", "gate")  # these decide if several modules could be the router


@dataclass(frozen=True)
class Experts:
    """The mixtures of a block.

    Attributes:
        holders: paths of the modules that hold experts which a router chooses from.
        routers: paths of the modules that choose or weigh experts, and of single-output gates beside experts.
    """

    holders: frozenset[str]
    routers: frozenset[str]

    def hold(self, path: str) -> bool:
        """Whether the module at `path` is in a holder, so that it gets only the tokens that a router sends there."""
        return any(f"{path}.".startswith(f"{holder}.") for holder in self.holders)


def find_experts(block: nn.Module) -> Experts:
    """The mixtures of a block, recognised by the structure of its modules.

    A holder is a module with stacks of matrices (E, O, I), or a list of E modules of one type. A router is beside a
    holder and has a single matrix, with one row for each expert. If several modules fit, their names decide. A module
    with "router" in its path is always a router. A gate may weigh shared experts too, and has rows for these: then the
    module with the most experts is the holder.
    """
    modules = dict(block.named_modules())
    beside: dict[str, dict[str, int]] = {}  # number of experts of each holder, by the holder's parent
    for path, module in modules.items():
        if count := _count(module):
            beside.setdefault(path.rpartition(".")[0], {})[path] = count
            if not isinstance(module, nn.ModuleList):
                beside.setdefault(path, {})[path] = count
    holders, routers = set(), {path for path in modules if "router" in path}
    nearest = {max((owner for owner in beside if _inside(path, owner)), key=len, default=None) for path in routers}
    for owner, counts in beside.items():
        lone = dict(_lone_matrices(owner, modules[owner], counts))
        fitting = {holder: [path for path, rows in lone.items() if rows == count] for holder, count in counts.items()}
        if not any(fitting.values()):
            every = sum(count for holder, count in counts.items() if holder != owner)
            fitting[max(counts, key=lambda holder: counts[holder])] = [
                path for path, rows in lone.items() if rows == every and _is_called_router(path, owner)
            ]
        for holder, paths in fitting.items():
            chosen = _called_router(paths, owner)
            if chosen:
                holders.add(holder)
            routers |= {*chosen, *(path for path, rows in lone.items() if rows == 1)}
        if owner in nearest:
            holders |= counts.keys()
    return Experts(frozenset(holders), frozenset(routers))


def stacks(module: nn.Module) -> dict[str, Tensor]:
    """The three-dimensional parameters of a module itself, except those of a convolution."""
    if isinstance(module, nn.Conv1d):
        return {}
    return {name: value for name, value in module.named_parameters(recurse=False) if value.dim() == 3}


def _inside(path: str, owner: str) -> bool:
    return path.startswith(f"{owner}.".lstrip("."))


def _count(module: nn.Module) -> int:
    """How many experts a module holds."""
    if isinstance(module, nn.ModuleList):
        return len(module) if len(module) > 1 and len({type(part) for part in module}) == 1 else 0
    return next((value.shape[0] for value in stacks(module).values()), 0)


def _lone_matrices(owner: str, module: nn.Module, holders: dict[str, int]) -> Iterator[tuple[str, int]]:
    """Path and rows of each matrix that is the only one in its child of `module`; holders are left out."""
    for name, child in module.named_children():
        path = f"{owner}.{name}".lstrip(".")
        if path in holders:
            continue
        matrices = [(inner, rows) for inner, part in child.named_modules() if (rows := _rows(part))]
        if len(matrices) > 1:  # a bias of each expert may be a matrix of one row
            matrices = [(inner, rows) for inner, rows in matrices if rows > 1]
        if len(matrices) == 1:
            inner, rows = matrices[0]
            yield f"{path}.{inner}".rstrip("."), rows


def _rows(module: nn.Module) -> int:
    """Outputs of the first matrix of a module itself, 0 if it has none."""
    matrix = next((value for value in module.parameters(recurse=False) if value.dim() == 2), None)
    if matrix is None:
        return 0
    return matrix.shape[1 if isinstance(module, Conv1D) else 0]


def _is_called_router(path: str, owner: str) -> bool:
    return any(word in path[len(owner) :] for word in ROUTER_NAMES)


def _called_router(paths: list[str], owner: str) -> list[str]:
    """The paths with a name of a router in them, or all paths if none has."""
    for word in ROUTER_NAMES:
        if matches := [path for path in paths if word in path[len(owner) :]]:
            return matches
    return paths
