"""BESA: learn the pruning rate of each row or linear on the error of the block's output (ICLR 2024, section 3.2).

Shape suffixes: N sequences, T tokens, C channels, O rows, I columns, D candidate pruning rates, R rate groups
(O when each row learns rates of its own, 1 when the linear shares them).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from besa.allocation.problem import Allocated, BlockProblem, RankedLinear
from besa.budget import apportion
from besa.losses import reconstruction_error
from besa.masks import StraightThrough, candidate_ranks
from besa.settings import Settings


class Besa(Settings):
    """Learned allocation with the paper's choices as fields."""

    method: Literal["besa"] = "besa"
    rates: Literal["row", "layer"] = "row"
    candidate_step: float = Field(default=0.01, gt=0, le=0.5)
    mask: Literal["count", "probability"] = "count"
    teacher: Literal["dense", "pruned"] = "dense"
    epochs: int = Field(default=1, ge=1)
    batch: int = Field(default=1, ge=1)
    penalty: float = Field(default=5.0, ge=0)
    learning_rate: float = Field(default=0.05, gt=0)
    width: float = 0.1

    def allocate(self, problem: BlockProblem) -> Allocated:
        target = problem.zeros / problem.weights
        rates_D = candidate_rates(self.candidate_step).to(problem.targets_NTC.device)
        learned = {n: LearnedRates.start(l, rates_D, target, self) for n, l in problem.linears.items()}
        optimizer = torch.optim.Adam([l.logits_RD for l in learned.values()], lr=self.learning_rate, betas=(0.9, 0.95))
        losses = []
        n = problem.inputs_NTC.shape[0]
        total = self.epochs * (n // self.batch)
        g = torch.Generator().manual_seed(problem.seed)
        step = 0
        for _ in range(self.epochs):
            for idx in torch.randperm(n, generator=g).split(self.batch):
                for gr in optimizer.param_groups:
                    gr["lr"] = self.learning_rate * (1 - step / total)
                out = problem.block(problem.inputs_NTC[idx], {k: l.masked() for k, l in learned.items()})
                recon = reconstruction_error(out, problem.targets_NTC[idx])
                sparsity = sum(l.alpha().sum() * (l.linear.w_OI.numel() / l.logits_RD.shape[0]) for l in learned.values()) / problem.weights
                loss = recon + self.penalty * ((sparsity - target) / target) ** 2
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(recon.detach()))
                step += 1
        rates = torch.cat([l.alpha().detach().expand(l.linear.w_OI.shape[0]).cpu() for l in learned.values()])
        widths = torch.cat([torch.full((l.linear.w_OI.shape[0],), l.linear.w_OI.shape[1]) for l in learned.values()])
        self.__dict__["_last"] = (float(sparsity),)
        counts = apportion(rates, widths, problem.zeros, torch.cat([l.linear.zeros_O for l in learned.values()]))
        parts = counts.split([l.linear.w_OI.shape[0] for l in learned.values()])
        return Allocated(dict(zip(learned, parts)), losses)


def candidate_rates(step: float) -> Tensor:
    k = round(1 / step)
    return torch.arange(k + 1) / k


@dataclass
class LearnedRates:
    linear: RankedLinear
    rates_D: Tensor
    logits_RD: Tensor
    order_OI: Tensor
    taken_ID: Tensor
    mask: str

    @classmethod
    def start(cls, linear, rates_D, target, s):
        R = linear.w_OI.shape[0] if s.rates == "row" else 1
        I = linear.w_OI.shape[1]
        logits = initial_logits(rates_D, target, s.width)
        order = torch.empty(linear.ranks_OI.shape, dtype=torch.int64).scatter_(1, linear.ranks_OI.long(), torch.arange(I).expand_as(linear.ranks_OI))
        taken = (torch.arange(I)[:, None] < candidate_ranks(rates_D, I)[None]).float()
        return cls(linear, rates_D, logits.repeat(R, 1).requires_grad_(), order, taken, s.mask)

    def beta(self):
        return self.logits_RD.softmax(-1)

    def alpha(self):
        return self.beta() @ self.rates_D

    def masked(self):
        beta = self.beta()
        with torch.no_grad():
            counts = ((beta @ self.rates_D) * self.linear.w_OI.shape[1] + 1e-4).floor().long().expand(self.linear.w_OI.shape[0])
        return StraightThrough.apply(beta, self.linear.w_OI, self.linear.ranks_OI, counts, self.order_OI, self.taken_ID)


def initial_logits(rates_D, target, width):
    # a bell of the given width around a centre such that the mean is the target
    lo, hi = -2.0, 3.0
    for _ in range(60):
        c = (lo + hi) / 2
        logits = -((rates_D - c) ** 2) / (2 * width ** 2)
        if float(logits.softmax(-1) @ rates_D) < target: lo = c
        else: hi = c
    return logits
