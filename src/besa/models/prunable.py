"""The prunable matrices of a decoder block: found by module type, and all read as (output, input) channels.

Shape suffixes: O rows (output channels), I columns (input channels), E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from besa.models.experts import find_experts, stacks


@dataclass(frozen=True)
class Prunable:
    """A matrix W (O, I) inside a parameter of a block.

    Attributes:
        parameter: name of the parameter within the block, such as ``mlp.up_proj.weight``.
        rows: O.
        columns: I.
        transposed: the parameter is stored (I, O), as GPT-2's ``Conv1D`` does.
        expert: its index in a three-dimensional parameter, None for a parameter that is one matrix.
        routed: whether it gets only the tokens that a router sends to it.
    """

    parameter: str
    rows: int
    columns: int
    transposed: bool = False
    expert: int | None = None
    routed: bool = False

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    def of(self, parameter: Tensor) -> Tensor:
        """The matrix (O, I) as a view of its parameter."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return matrix.T if self.transposed else matrix


def everywhere(name: str) -> str:
    """The pattern that matches a name in every block and every expert."""
    return ".".join("*" if step.isdecimal() else step for step in name.split("."))


def find_prunables(block: nn.Module) -> dict[str, Prunable]:
    """The prunable matrices of a block by the path of their module within it, in module order.

    These are the weights of ``nn.Linear`` (Falcon's included) and GPT-2's ``Conv1D``, and each expert of a stack (E, O,
    I). Routers and gates of experts stay dense.
    """
    experts = find_experts(block)
    prunables: dict[str, Prunable] = {}
    for path, module in block.named_modules():
        routed = experts.hold(path)
        if not isinstance(module, nn.Linear | Conv1D):
            prunables |= _stacked(path, module, routed)
        elif path not in experts.routers:
            transposed = isinstance(module, Conv1D)
            rows, columns = module.weight.shape[::-1] if transposed else module.weight.shape
            prunables[path] = Prunable(f"{path}.weight", rows, columns, transposed, routed=routed)
    return prunables


def _stacked(path: str, module: nn.Module, routed: bool) -> dict[str, Prunable]:
    """The experts of a module that keeps them as three-dimensional parameters.

    An expert has a matrix in each of them. LongCat's experts that compute nothing have places in one of two.
    """
    parameters = stacks(module)
    transposed = _stored_transposed(module, list(parameters.values()))
    experts = min(map(len, parameters.values()), default=0)
    prunables = {}
    for name, value in parameters.items():
        rows, columns = value.shape[:0:-1] if transposed else value.shape[1:]
        for expert in range(experts):
            parameter = f"{path}.{name}".lstrip(".")
            prunables[f"{parameter}.{expert}"] = Prunable(parameter, rows, columns, transposed, expert, routed)
    return prunables


def _stored_transposed(module: nn.Module, parameters: list[Tensor]) -> bool:
    """Whether experts are stored (E, I, O).

    Modules whose experts transformers dispatches have an attribute for it. For others the shapes decide: the output of
    the last stack is as wide as the input of the first.
    """
    if hasattr(module, "is_transposed"):
        return bool(module.is_transposed)
    if len(parameters) < 2:
        return False
    first, last = parameters[0], parameters[-1]
    return first.shape[2] != last.shape[1] and first.shape[1] == last.shape[2]


def replaced(
    parameters: Mapping[str, Tensor], prunables: Mapping[str, Prunable], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The parameters that change if some matrices are replaced, in the layout of the block.

    Args:
        parameters: the block's own, by name.
        prunables: as from `find_prunables`.
        weights: matrices (O, I) by the names of `prunables`; gradients reach them.
    """
    changed: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}
    for name, w_OI in weights.items():
        prunable = prunables[name]
        stored = w_OI.T if prunable.transposed else w_OI
        if prunable.expert is None:
            changed[prunable.parameter] = stored
        else:
            if prunable.parameter not in stacks:
                stacks[prunable.parameter] = list(parameters[prunable.parameter].unbind())
            stacks[prunable.parameter][prunable.expert] = stored
    return changed | {name: torch.stack(stack) for name, stack in stacks.items()}
