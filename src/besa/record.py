"""The run record: one JSON file beside the weights that says how a model was pruned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from besa.errors import BesaError

RECORD_NAME = "besa_run.json"
HISTOGRAM_BINS = 50
PASSED_NAMES = 8  # examples in a record, because there may be many
Result = TypeVar("Result", bound=BaseModel)


class Record(BaseModel):
    """Base of all parts. Unknown keys, which a later besa may write, are ignored."""

    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="strings")


class LinearRecord(Record):
    """One pruned linear, counted in the written tensor."""

    name: str
    shape: list[int]
    zeros: int
    sparsity: float
    importance_kept: float = Field(description="mean importance of the kept weights")
    reached: bool = Field(
        default=True, description="whether calibration tokens reached it; if not, its weights alone decided"
    )
    row_rates: list[int] = Field(description=f"rows by pruning rate, in {HISTOGRAM_BINS} equal bins of [0, 1]")


class BlockRecord(Record):
    """One pruned block."""

    index: int
    name: str
    weights: int
    zeros: int
    sparsity: float
    reconstruction_error: float = Field(description="against the dense path, by losses.reconstruction_error")
    losses: list[float] = Field(
        description="reconstruction loss of each learning step; of blocks pruned together, in the last"
    )
    finetuning: list[float] = Field(
        default=[],
        description="held-out loss before fine-tuning and after every epoch; of blocks pruned together, in the last",
    )
    seconds: float
    phases: dict[str, float] = Field(default={}, description="seconds by phase")
    sent: dict[str, int] = Field(default={}, description="bytes that each of several ranks sent to others, by phase")
    structures: dict[str, tuple[int, int]] = Field(
        default={}, description="how many there were and how many stay, by kind, where structures go whole"
    )
    linears: list[LinearRecord]


class MixtureRecord(Record):
    """The experts of one mixture, and which of them were dropped."""

    name: str = Field(description="path of the module that has router and experts")
    experts: int = Field(description="number before")
    gone: list[int] = Field(description="experts that were dropped, by their numbers in the dense model")
    scores: list[float] = Field(description="of all experts; the lowest went")
    tokens: list[int] = Field(description="calibration tokens of each expert in the dense model")


class DistillingRecord(Record):
    """The stage in which the whole model learned."""

    epochs: int = Field(default=0, description="that step sizes were laid out for, of each part that learns by itself")
    losses: list[float] = Field(description="held-out loss in nats before the first epoch and after every epoch")
    passes: float = Field(default=0.0, description="forward passes over the calibration set; a backward pass is two")
    study: dict[str, Any] = Field(default={}, description="the sequences that it learned from, as of calibration")
    seconds: float
    phases: dict[str, float] = Field(description="seconds by phase")
    sent: dict[str, int] = Field(default={}, description="bytes that each of several ranks sent to others, by phase")


class PassedThrough(Record):
    """Stored tensors that transformers does not build; they are copied to the bit."""

    tensors: int = 0
    bytes: int = 0
    names: list[str] = Field(default=[], description=f"of the first {PASSED_NAMES}")


class EarlierRun(Record):
    """A run that had made the model what it was before this one, in short."""

    created: str | None = None
    recipe: str | None = Field(default=None, description="its name")
    sparsity: float | None = None
    seed: int | None = None
    calibration: list[str] = Field(default=[], description="the texts, as the user named them")
    shrunk: dict[str, tuple[int, int]] = Field(
        default={},
        description="how many structures there had been and how many were left, by kind, of those that went",
    )


class RunRecord(Record):
    """The record of a run: all that is needed to understand a pruned model and to make it again."""

    schema_version: int = 1
    created: str
    command: list[str] | None = None
    recipe: dict[str, Any]
    seed: int
    batch: int | None = Field(default=None, description="calibration sequences in a forward pass; sums round by it")
    model: dict[str, Any]
    calibration: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]
    blocks: list[BlockRecord]
    distilling: DistillingRecord | None = Field(default=None, description="None if the model was not distilled")
    mixtures: list[MixtureRecord] = Field(default=[], description="those that lost whole experts")
    dropped: int = Field(default=0, description="parameters of the dense model that went with whole experts")
    weights: int
    zeros: int
    sparsity: float
    model_sparsity: float | None = Field(
        default=None, description="share of all parameters of the dense model that is pruned or dropped"
    )
    dense: dict[str, int] = Field(
        default={}, description="weights of the blocks' matrices that stay dense, by name within a block"
    )
    seconds: float = Field(description="of a run that went on, with those of all that it had kept")
    ranks: int = Field(default=1, description="processes that pruned together")
    machines: int = Field(default=1, description="machines that they were on, with as many each")
    dequantized: bool = Field(default=False, description="whether quantised weights were written as dense numbers")
    peak_memory_bytes: int = Field(description="of the process that took most, since the run went on")
    peak_gpu_memory_bytes: int | None = None
    notes: list[str] = Field(default=[], description="notices for the user, one sentence each")
    passed_through: PassedThrough = PassedThrough()
    earlier: list[EarlierRun] = Field(default=[], description="of besa on the same model, the first one first")
    restored_blocks: int = Field(default=0, description="blocks taken from the journal of an interrupted run")
    files: dict[str, str] = Field(default={}, description="sha256 of each file of the folder, added at the end")

    @property
    def experts(self) -> tuple[int, int] | None:
        """The number of experts of each mixture before and after; None if all stayed."""
        first = next(iter(self.mixtures), None)
        return (first.experts, first.experts - len(first.gone)) if first is not None else None

    @property
    def bits(self) -> int | None:
        """Bits of a quantised weight; None if none is quantised."""
        settings = self._choice("quantization")
        bits = settings.get("bits")
        return bits if settings.get("method", "none") != "none" and isinstance(bits, int) else None

    @property
    def pattern(self) -> str | None:
        """The n:m pattern of the weights that were kept, such as ``2:4``; None if there is none."""
        settings = self._choice("allocation")
        keep, of = settings.get("keep"), settings.get("of")
        if settings.get("method") != "nm" or not (isinstance(keep, int) and isinstance(of, int)):
            return None
        return f"mixed n:{of}" if settings.get("mixed") else f"{keep}:{of}"

    def _choice(self, stage: str) -> Mapping[str, Any]:
        """The settings of a stage of the recipe."""
        settings = self.recipe.get(stage)
        return settings if isinstance(settings, dict) else {}

    @property
    def unreached(self) -> int:
        """The number of linears that have zeros and that no calibration token reached."""
        return sum(not linear.reached and linear.zeros > 0 for block in self.blocks for linear in block.linears)

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Read a record.

        Raises:
            BesaError: the file is missing, or is no run record.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError:
            raise BesaError(f"{path} cannot be read: give a folder that `besa prune` wrote.") from None
        except (ValidationError, UnicodeDecodeError):
            raise BesaError(f"{path} is not a besa run record: give a folder that `besa prune` wrote.") from None

    @classmethod
    def of(cls, folder: Path) -> RunRecord | None:
        """The record of a folder; None if the folder has none, or one that holds only digests.

        Raises:
            BesaError: the file is no run record.
        """
        path = folder / RECORD_NAME
        if not path.exists():
            return None
        try:
            if set(json.loads(path.read_text(encoding="utf-8"))) == {"files"}:
                return None
        except (OSError, ValueError, TypeError, RecursionError):
            pass  # `read` reports it
        return cls.read(path)

    @classmethod
    def known(cls, folder: Path) -> RunRecord | None:
        """As `of`; None too if the record is of another tool, or of a besa that wrote other records."""
        try:
            return cls.of(folder)
        except BesaError:
            return None


def now() -> str:
    """The time in ISO 8601, UTC, to the microsecond: runs are told apart by it, and two may end within one second."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def read_result(path: Path, kind: type[Result], name: str, command: str) -> Result:
    """Read what a command wrote beside a model.

    Args:
        path: of the JSON.
        kind: of the result.
        name: what it is, in words.
        command: that writes it.

    Raises:
        BesaError: the file cannot be read, or is no such result.
    """
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError:
        raise BesaError(f"{path} cannot be read: check its permissions.") from None
    except (ValidationError, UnicodeDecodeError):
        raise BesaError(f"{path} is not a besa {name}: write it anew with `besa {command}`.") from None
