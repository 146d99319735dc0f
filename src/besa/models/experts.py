"""Mixtures of experts in a block: which modules hold experts, and which linears choose among them.

Shape suffixes: E experts, O rows (output channels), I columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ROUTER_NAMES = ("router", "gate")  # of several that could be a router, the one that is called so


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
        """Whether the module at `path` is in a holder, so that only the tokens reach it that a router sends there."""
        return any(f"{path}.".startswith(f"{holder}.") for holder in self.holders)


def find_experts(block: nn.Module) -> Experts:
    """The mixtures of a block, told by where modules stand.

    A holder is a module with stacks of matrices (E, O, I), or a list of E like modules. A router stands beside it, has
    no other matrix than one with a row for each expert, and, of several such, is called so. Whatever has "router" in
    its path is one, too.
    """
    modules = dict(block.named_modules())
    beside: dict[str, dict[str, int]] = {}  # experts of each holder, by what the holder stands in
    for path, module in modules.items():
        if count := _count(module):
            beside.setdefault(path.rpartition(".")[0], {})[path] = count
            if not isinstance(module, nn.ModuleList):
                beside.setdefault(path, {})[path] = count
    holders, routers = set(), {path for path in modules if "router" in path}
    for owner, own in beside.items():
        lone = dict(_lone_matrices(owner, modules[owner], own))
        for holder, count in own.items():
            chosen = _called_so([path for path, rows in lone.items() if rows == count], owner)
            if chosen:
                holders.add(holder)
            routers |= {*chosen, *(path for path, rows in lone.items() if rows == 1)}
        if any(path.startswith(f"{owner}.".lstrip(".")) for path in modules if "router" in path):
            holders |= own.keys()
    return Experts(frozenset(holders), frozenset(routers))


def stacks(module: nn.Module) -> dict[str, Tensor]:
    """The three-dimensional parameters of a module itself; those of a convolution are none of experts."""
    if isinstance(module, nn.Conv1d):
        return {}
    return {name: value for name, value in module.named_parameters(recurse=False) if value.dim() == 3}


def _count(module: nn.Module) -> int:
    """How many experts a module holds."""
    if isinstance(module, nn.ModuleList):
        return len(module) if len(module) > 1 and len({type(part) for part in module}) == 1 else 0
    return next((value.shape[0] for value in stacks(module).values()), 0)


def _lone_matrices(owner: str, module: nn.Module, holders: dict[str, int]) -> Iterator[tuple[str, int]]:
    """The rows of what has one matrix and no more, of a module's parts that are no holders; by the matrix's module."""
    for name, child in module.named_children():
        path = f"{owner}.{name}".lstrip(".")
        if path in holders:
            continue
        matrices = [(inner, own) for inner, own in child.named_modules() if _rows(own)]
        if len(matrices) == 1:
            inner, own = matrices[0]
            yield f"{path}.{inner}".rstrip("."), _rows(own)


def _rows(module: nn.Module) -> int:
    """Outputs of the first matrix that a module itself has, 0 where it has none."""
    matrix = next((value for value in module.parameters(recurse=False) if value.dim() == 2), None)
    if matrix is None:
        return 0
    return matrix.shape[1 if isinstance(module, Conv1D) else 0]


def _called_so(paths: list[str], owner: str) -> list[str]:
    for word in ROUTER_NAMES:
        if found := [path for path in paths if word in path[len(owner) :]]:
            return found
    return paths
