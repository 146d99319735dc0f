"""The training of a student: stages, epochs and steps, from the last state on, and the best values at the end.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, O rows, I columns, K kept weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from besa.methods.distilling.snapshots import Snapshots
from besa.methods.distilling.states import States
from besa.methods.distilling.student import Distilled, Student
from besa.methods.reconstruction.written import written
from besa.methods.steps import average, one_pass, root_mean_square
from besa.models.kept import kept_of, spread
from besa.models.transfers import fetched
from besa.observing.prediction_loss import prediction_loss, tokens_at_once
from besa.progress import Progress
from besa.quantization.minmax import dequantized, kept_codes
from besa.system import ranks
from besa.system.machine import learning_dtype, loss_scaler

if TYPE_CHECKING:
    from besa.methods.distilling.kl import MaskedKL

WARM = 0.05  # share of the steps in which the step size grows
EASED = 0.3  # factor of the step size after an epoch that did not lower the held-out loss
PATIENCE = 2  # such epochs in a row, and learning ends
CLIPPED = 1.0  # largest norm of the gradient of a step
BETAS = (0.9, 0.99)  # of Adam


class Trainer:
    """The work of `MaskedKL.distill`.

    What learns are float32 values: norms and biases, and of each linear the vector of its kept weights. The best so far
    are the model's own tensors.
    """

    def __init__(self, settings: MaskedKL, student: Student, snapshots: Snapshots, progress: Progress) -> None:
        self._settings, self._student, self._progress = settings, student, progress
        whole = student.whole
        self._linears = set(student.linears)
        self._dtype = learning_dtype(whole.dtype, whole.device) if settings.autocast else whole.dtype
        self._stages = settings.stages(student.linears, whole.vectors)
        self._states = States(student, [name for names in self._stages for name in names], snapshots)
        self._dense = {name: whole.own(name).clone() for name in whole.vectors}
        self._steps = -(-len(student.training_set.learned(0)) // settings.sequences)  # in an epoch
        self._at_once = tokens_at_once(whole.vocabulary)
        self._epochs = settings.epochs
        self._losses: list[float] = []
        self._helped = False

    def run(self) -> Distilled:
        """All stages, from the last state on."""
        begun = self._states.position
        self._losses, self._helped = list(begun.get("losses", [])), begun.get("helped", False)
        if self._helped:
            self._states.restore_best()
        self._epochs = begun.get("epochs", self._epochs)
        if not self._losses:
            began = time.perf_counter()
            self._losses.append(self._held_out_loss({}))
            if self._settings.minutes is not None:
                self._epochs = ranks.from_first(self._fitting(time.perf_counter() - began))
        for number in range(begun.get("stage", 0), len(self._stages)):
            self._learn(number, begun)
            begun = {}
        whole = self._student.whole
        changed = [name for name, before in self._dense.items() if not torch.equal(whole.own(name), before)]
        return Distilled(self._epochs, self._losses, self._helped, changed)

    def _fitting(self, seconds: float) -> int:
        """The epochs that fit into the minutes that are left.

        Args:
            seconds: of a forward pass over the held-out sequences.
        """
        settings, head = self._settings, self._student.head
        assert settings.minutes is not None
        epoch = seconds * settings.epoch_passes(head) / settings.measuring_passes(head)
        return max(0, int((60 * settings.minutes - self._student.seconds - seconds) / epoch))

    def _learn(self, number: int, begun: Mapping[str, Any]) -> None:
        """A stage, from its beginning or from a place in it."""
        names, own = self._stages[number], self._student.whole.own
        sizes: list[float] = (
            begun.get("sizes") or torch.stack([root_mean_square(own(name).float()) for name in names]).tolist()
        )
        values = {name: self._value(name).requires_grad_() for name in names}
        groups = [{"params": [value], "lr": 0.0} for value in values.values()]
        optimizer = torch.optim.Adam(groups, betas=BETAS, fused=True)
        scaler = loss_scaler(self._dtype, self._student.whole.device)
        if "sizes" in begun:
            scaler.load_state_dict(begun["scaler"])
            self._states.restore_values(values, optimizer)
        first: int = begun.get("first", len(self._losses))
        position: dict[str, Any] = {"stage": number, "sizes": sizes, "first": first, "eased": begun.get("eased", 0)}
        for epoch in range(begun.get("epoch", 0), self._epochs):
            generator = torch.Generator().manual_seed(self._student.seed + epoch)
            order = one_pass(self._student.training_set.learned(epoch), self._settings.sequences, generator)
            for step in range(begun.get("step", 0) if epoch == begun.get("epoch") else 0, self._steps):
                rate = self._rate(epoch * self._steps + step) * EASED ** position["eased"]
                for group, size in zip(optimizer.param_groups, sizes, strict=True):
                    group["lr"] = rate * size
                self._step(values, optimizer, scaler, order[step])
                self._tell(number, epoch, step + 1)
                position |= {"epoch": epoch, "step": step + 1, "scaler": scaler.state_dict()}
                self._keep(position, values, optimizer, urgent=False)
            self._losses.append(self._held_out_loss(values))
            self._tell(number, epoch + 1, 0)
            if self._losses[-1] < min(self._losses[:-1]):
                self._write(values)
            elif len(self._losses) >= first + PATIENCE and self._best_is_past():
                break
            else:
                position["eased"] += 1
                for name, value in values.items():
                    value.detach().copy_(self._value(name))
            self._keep(position | {"epoch": epoch + 1, "step": 0}, values, optimizer, urgent=True)
        self._keep({"stage": number + 1}, {}, optimizer, urgent=True)

    def _value(self, name: str) -> Tensor:
        """The model's own tensor as a value that can learn."""
        own = self._student.whole.own(name)
        return kept_of(own) if name in self._linears else own.float().clone()

    def _tensor(self, name: str, value: Tensor) -> Tensor:
        """A value as the model has it, in the shape and dtype of its own tensor; no kept weight becomes zero."""
        own, value = self._student.whole.own(name), value.detach()
        if name not in self._linears:
            return value.to(own.dtype)
        return written(spread(value, own), own != 0, own.dtype)

    def _step(
        self,
        values: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        sequences: Sequence[int],
    ) -> None:
        """Learn from some sequences of all ranks."""
        scale = scaler.scale(torch.ones((), device=self._student.whole.device))
        predicting = self._predicting(values)
        for place in self._student.share.own(sequences):
            self._loss(predicting, place, scale)
        for name, value in values.items():
            value.grad = predicting[name].grad  # straight through the rounding, if there is one
        average(values.values(), len(sequences))
        scaler.unscale_(optimizer)
        reached = [value for value in values.values() if value.grad is not None]  # an expert may have had no token
        torch.nn.utils.clip_grad_norm_(reached, CLIPPED)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def _rate(self, step: int) -> float:
        """The step size of a step of a stage, as a share of a tensor's root mean square."""
        steps = self._epochs * self._steps
        warm = max(1, round(WARM * steps))
        share = min((step + 1) / warm, (steps - step) / (steps - warm + 1))
        return self._settings.rate * math.sqrt(self._settings.sequences) * share

    def _held_out_loss(self, values: Mapping[str, Tensor]) -> float:
        """The mean loss of the held-out sequences of all ranks."""
        predicting, student = self._predicting(values), self._student
        losses = [self._loss(predicting, place, None) for place in student.share.own(student.training_set.held)]
        of_ranks = ranks.all_of(torch.stack(losses).tolist() if losses else [])
        return fmean(loss for of_rank in of_ranks for loss in of_rank)

    def _predicting(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values that the model predicts with: linears with grids are rounded, learning or not."""
        predicting = dict(values)
        for name, grid in self._student.grids.items():
            own, value = self._student.whole.own(name), values.get(name)
            w_OI = own if value is None else self._tensor(name, value)
            q_OI = dequantized(kept_codes(w_OI, grid), grid, own.dtype)
            predicting[name] = q_OI if value is None else kept_of(own, q_OI, len(value)).requires_grad_()
        return predicting

    def _loss(self, values: Mapping[str, Tensor], place: int, scale: Tensor | None) -> Tensor:
        """The loss (scalar) of a sequence; with a scale, its gradients are added to those of the values."""
        student, whole, dtype = self._student, self._student.whole, self._dtype
        one = slice(place, place + 1)
        kept = (student.tokens_NT, student.inputs_NTC, student.targets_NTC)
        tokens_NT, x_NTC, target_NTC = (fetched(tensors[one], whole.device) for tensors in kept)
        states = whole.states(x_NTC, values, dtype)
        loss, gradient_NTC = prediction_loss(
            lambda part, y_NTC: whole.logits(tokens_NT[:, part], y_NTC, values, dtype),
            lambda part, y_NTC: whole.logits(tokens_NT[:, part], y_NTC, self._dense, dtype),
            states[-1],
            target_NTC,
            tokens_NT,
            self._settings.cross_entropy,
            self._at_once,
            scale,
        )
        if scale is not None:
            whole.send_back(states, gradient_NTC, values, dtype)
        return loss

    def _tell(self, stage: int, epoch: int, step: int) -> None:
        """Report the progress; epochs that are not needed count as done."""
        epochs, first, best = self._epochs, self._losses[0], min(self._losses)
        done = (stage * epochs + epoch) * self._steps + step
        note = f"distilling, held-out loss {first:.4f}" + (f" → {best:.4f}" if self._losses[1:] else "")
        self._progress(done, len(self._stages) * epochs * self._steps, note)

    def _best_is_past(self) -> bool:
        """Whether none of the last epochs lowered the held-out loss."""
        return min(self._losses[-PATIENCE:]) >= min(self._losses[:-PATIENCE])

    def _write(self, values: Mapping[str, Tensor]) -> None:
        """Write values into the model: they are the best so far."""
        self._helped = True
        for name, value in values.items():
            self._student.whole.own(name).copy_(self._tensor(name, value))

    def _keep(
        self,
        position: Mapping[str, Any],
        values: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        urgent: bool,
    ) -> None:
        """Keep a state."""
        position = {**position, "epochs": self._epochs, "losses": self._losses, "helped": self._helped}
        self._states.keep(position, values, optimizer, best=self._helped, urgent=urgent)
