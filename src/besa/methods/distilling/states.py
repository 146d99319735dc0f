"""The states of a training, by which one that was interrupted goes on.

Shape suffixes: O rows, I columns, K kept weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from besa.methods.distilling.snapshots import Snapshots
from besa.methods.distilling.student import Student


class States:
    """Keeps states of a student that learns, and restores the last one.

    A state has the best values so far, which are the student's own tensors, and the values that learn with their
    moments. A group of it is a block, or what is outside.

    Args:
        student: the model.
        names: full names of all tensors that learn at any time, in their order.
        snapshots: where states are kept.
    """

    def __init__(self, student: Student, names: Sequence[str], snapshots: Snapshots) -> None:
        self._whole, self._names, self._snapshots = student.whole, list(dict.fromkeys(names)), snapshots
        self._linears = set(student.linears)

    @property
    def position(self) -> Mapping[str, Any]:
        """Position of the last state, in JSON types; empty if there is none."""
        return self._snapshots.position or {}

    def keep(
        self,
        position: Mapping[str, Any],
        values: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        best: bool,
        urgent: bool,
    ) -> None:
        """Keep a state.

        Args:
            position: in the work, in JSON types.
            values: that learn at present, by full name.
            optimizer: has their moments.
            best: whether the student's own tensors have changed, so that the state needs them.
            urgent: as of `Snapshots.keep`.
        """
        tensors: dict[str, dict[str, Tensor]] = {}
        for name in self._names:
            tensors[name] = {"best": self._whole.own(name)} if best else {}
            if name in values:
                tensors[name] |= {"value": values[name].detach(), **optimizer.state.get(values[name], {})}
        self._snapshots.keep(position, self._compressed(tensors), urgent)

    def restore_best(self) -> None:
        """Fill the student's own tensors from the last state."""
        self._restore({name: {"best": self._whole.own(name)} for name in self._names})

    def restore_values(self, values: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Fill values and their moments from the last state; a value that no gradient has reached has none."""
        for group, names in self._groups(values).items():
            kept = self._snapshots.tensors(group)
            for name in names:
                if f"step.{name}" in kept:
                    state = {kind: torch.zeros_like(values[name]) for kind in ("exp_avg", "exp_avg_sq")}
                    step = torch.zeros_like(kept[f"step.{name}"], device=values[name].device)  # as fused Adam has it
                    optimizer.state[values[name]] = {"step": step, **state}
        self._restore(
            {name: {"value": value.detach(), **optimizer.state.get(value, {})} for name, value in values.items()}
        )

    def _compressed(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The tensors of a state by group, made one group at a time; of linears, the kept weights."""
        for group, names in self._groups(tensors).items():
            yield (
                group,
                {
                    f"{kind}.{name}": tensor[tensor != 0] if self._sparse(name, tensor) else tensor
                    for name in names
                    for kind, tensor in tensors[name].items()
                },
            )

    def _restore(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fill tensors from the last state."""
        for group, names in self._groups(tensors).items():
            kept = self._snapshots.tensors(group)
            for name in names:
                for kind, tensor in tensors[name].items():
                    numbers = kept[f"{kind}.{name}"].to(tensor.device)
                    if self._sparse(name, tensor):
                        tensor.masked_scatter_(tensor != 0, numbers)
                    else:
                        tensor.copy_(numbers)

    def _groups(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The names by the block that they belong to."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self._whole.place(name), []).append(name)
        return groups

    def _sparse(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor of a state is a linear's own, of which the state has the kept weights."""
        return name in self._linears and tensor.dim() > 1
