"""The prunable matrices of a decoder block: found by the kinds of its modules, all seen as (output, input) channels.

Shape suffixes: O rows (output channels), I columns (input channels), E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Prunable:
    """A matrix W (O, I) inside a parameter of a block.

    Attributes:
        parameter: name of the parameter within the block, such as ``mlp.up_proj.weight``.
        rows: O.
        columns: I.
        transposed: the parameter is stored (I, O), as GPT-2's ``Conv1D`` does.
        expert: which slice of a three-dimensional parameter it is, None for a parameter that is one matrix.
    """

    parameter: str
    rows: int
    columns: int
    transposed: bool = False
    expert: int | None = None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    def of(self, parameter: Tensor) -> Tensor:
        """The matrix (O, I) as a view of its parameter."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return matrix.T if self.transposed else matrix


def find_prunables(block: nn.Module) -> dict[str, Prunable]:
    """The prunable matrices of a block by the path of their module within it, in module order.

    These are the weights of ``nn.Linear`` (Falcon's included) and GPT-2's ``Conv1D``, and each expert of a stack (E, O,
    I). Routers stay dense: the linears with one output for each expert, or with a single output.
    """
    experts = _expert_counts(block)
    found: dict[str, Prunable] = {}
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            transposed = isinstance(module, Conv1D)
            rows, columns = module.weight.shape[::-1] if transposed else module.weight.shape
            if not (experts and rows in {1, *experts}):
                found[path] = Prunable(f"{path}.weight", rows, columns, transposed)
        else:
            found |= _stacked(path, module)
    return found


def _expert_counts(block: nn.Module) -> set[int]:
    """How many experts the block's mixtures have: lengths of stacks of matrices and of lists of like modules."""
    counts = {stack.shape[0] for module in block.modules() for _, stack in _stacks(module)}
    lists = [module for module in block.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    return counts | {len(module) for module in lists if len({type(part) for part in module}) == 1}


def _stacked(path: str, module: nn.Module) -> dict[str, Prunable]:
    """The experts of a module that keeps them as three-dimensional parameters."""
    stacks = _stacks(module)
    transposed = _stored_transposed(module, [value for _, value in stacks])
    found = {}
    for name, value in stacks:
        rows, columns = value.shape[:0:-1] if transposed else value.shape[1:]
        for expert in range(value.shape[0]):
            found[f"{path}.{name}.{expert}"] = Prunable(f"{path}.{name}", rows, columns, transposed, expert)
    return found


def _stacks(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The three-dimensional parameters of a module itself; those of a convolution are none of experts."""
    if isinstance(module, nn.Conv1d):
        return []
    return [(name, value) for name, value in module.named_parameters(recurse=False) if value.dim() == 3]


def _stored_transposed(module: nn.Module, stacks: list[Tensor]) -> bool:
    """Whether experts are stored (E, I, O).

    transformers says so where it dispatches experts itself. Elsewhere the shapes tell: the output of the last stack is
    as wide as the input of the first.
    """
    if hasattr(module, "is_transposed"):
        return bool(module.is_transposed)
    return len(stacks) > 1 and stacks[0].shape[2] != stacks[-1].shape[1] and stacks[0].shape[1] == stacks[-1].shape[2]


def replaced(
    parameters: Mapping[str, Tensor], prunables: Mapping[str, Prunable], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The parameters that change when some matrices are replaced, in the layout the block stores them in.

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
            stack = stacks.setdefault(prunable.parameter, list(parameters[prunable.parameter].unbind()))
            stack[prunable.expert] = stored
    return changed | {name: torch.stack(stack) for name, stack in stacks.items()}
