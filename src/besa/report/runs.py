"""What a report is made of: run folders, each under a name of its own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from besa.counting.budget import zeros_for
from besa.errors import BesaError
from besa.evaluation.result import EVALUATION_NAME, Evaluation
from besa.models.source import same_files
from besa.record import RECORD_NAME, RunRecord, read_result
from besa.report.forms import AS_PRUNED, Form, form_of
from besa.runtime.timings import BENCH_NAME, Bench
from besa.simulator import Simulation
from besa.storage.folders import check_regular
from besa.storage.names import path_of, printable

SIMULATION_NAME = "besa_simulation.json"


@dataclass(frozen=True)
class Origin:
    """A dense model; None stands for what nobody knows.

    Attributes:
        name: as the user gave it.
        revision: its commit on the Hugging Face Hub.
        fingerprint: digest of its files.
    """

    name: str | None = None
    revision: str | None = None
    fingerprint: str | None = None

    def may_be(self, other: Origin) -> bool:
        """Whether both are one model, as far as anybody knows: by their digests, or else by their names."""
        if self.fingerprint and other.fingerprint:
            return self.fingerprint == other.fingerprint
        pairs = ((self.name, other.name), (self.revision, other.revision))
        return all(ours == theirs for ours, theirs in pairs if ours and theirs)


@dataclass(frozen=True)
class Run:
    """A model in the report: pruned if it has a record, measured if it has an evaluation.

    Attributes:
        folder: where it was read from.
        record: how it was pruned.
        measured: how good it is.
        bench: how fast it is, beside other models.
        simulated: how fast it is on a simulated accelerator.
        form: what became of its files since.
    """

    folder: Path
    record: RunRecord | None = None
    measured: Evaluation | None = None
    bench: Bench | None = None
    simulated: Simulation | None = None
    form: Form = AS_PRUNED

    @property
    def dense(self) -> bool:
        """Whether this is an unpruned model."""
        return self.record is None and not (self.measured and self.measured.sparsity)

    @property
    def name(self) -> str:
        """The recipe's name, `dense`, or the folder's for a pruned model that has lost its record."""
        if self.record is not None:
            return printable(self.record.recipe.get("name") or "custom")
        return "dense" if self.dense else self.folder_name

    @property
    def folder_name(self) -> str:
        """The last part of the folder's path."""
        return printable(self.folder.resolve().name)

    @property
    def target(self) -> float | None:
        """The sparsity that was asked for, exceptions included; the counted one where nobody knows."""
        if self.record is None:
            return self.measured.sparsity if self.measured else None
        if self.record.recipe.get("sparsity_of") or blocks_asked(self.record):
            return _zeros_asked(self.record) / self.record.weights
        return float(self.record.recipe.get("sparsity", self.record.sparsity))

    @property
    def exact(self) -> bool:
        """Whether the zeros counted in the written tensors are the integer that was asked for."""
        return self.record is not None and self.record.zeros == _zeros_asked(self.record)

    @property
    def texts(self) -> list[str]:
        """Texts on which the perplexity was measured."""
        return list(self.measured.perplexity) if self.measured else []

    def perplexity(self, text: str) -> float | None:
        """Perplexity on a text, None if it was not measured."""
        return self.measured.perplexity.get(text) if self.measured else None

    @property
    def origin(self) -> Origin:
        """The dense model that it was made of, or is."""
        if self.record is not None:
            said = self.record.model
            return Origin(said.get("source"), said.get("revision"), said.get("fingerprint"))
        if self.measured is not None and self.dense:
            return Origin(self.measured.model, self.measured.revision, self.measured.fingerprint)
        return Origin()

    def is_rival(self, other: Run, text: str) -> bool:
        """Whether both are one model pruned as it was asked for alike, and their perplexities on a text compare."""
        asked = [
            (run.target, run.record.experts, run.record.bits, run.record.pattern) if run.record else (run.target,)
            for run in (self, other)
        ]
        return (
            not self.dense
            and not other.dense
            and asked[0] == asked[1]
            and self.origin.may_be(other.origin)
            and self.compares(other, text)
        )

    def compares(self, other: Run, text: str) -> bool:
        """Whether the perplexities of two runs on a text compare: both measured, on the same tokens in the same way."""
        if None in (self.perplexity(text), other.perplexity(text)):
            return False
        return self.basis(text) == other.basis(text) and self.same_tokens(other, text)

    def same_tokens(self, other: Run, text: str) -> bool:
        """Whether what both measured under one name is the same, as far as anybody knows.

        Two files may have one name, and two tokenizers make other tokens of one text. The tokens tell, or the beginning
        of the text where the numbers of windows differ.
        """
        if self.measured is None or other.measured is None:
            return True
        ours, theirs = self.measured.details.get(text), other.measured.details.get(text)
        if ours and theirs and ours.sha256 and theirs.sha256 and self.basis(text) == other.basis(text):
            return ours.sha256 == theirs.sha256
        begins = [measured.beginnings.get(text) for measured in (self.measured, other.measured)]
        return None in begins or begins[0] == begins[1]

    def basis(self, text: str) -> tuple[int, int | None, bool] | None:
        """How a perplexity was measured: length of windows, their number, whether they began with a BOS token."""
        if not self.measured:
            return None
        details = self.measured.details.get(text)
        return (self.measured.window, details.windows, details.bos) if details else (self.measured.window, None, False)


def _zeros_asked(record: RunRecord) -> int:
    """Number of zeros that the settings ask for: by `sparsity` and `sparsity_of`, or by a number of blocks."""
    if blocks_asked(record):
        return record.zeros
    sparsity, patterns = record.recipe.get("sparsity", record.sparsity), record.recipe.get("sparsity_of", {})
    asked, weights, zeros = 0, record.weights, record.zeros
    for linear in (linear for block in record.blocks for linear in block.linears):
        given = next((patterns[pattern] for pattern in patterns if fnmatchcase(linear.name, pattern)), None)
        if given is not None:
            size = math.prod(linear.shape)
            asked, weights, zeros = asked + _asked(given, size, linear.zeros), weights - size, zeros - linear.zeros
    return asked + _asked(sparsity, weights, zeros)


def _asked(sparsity: float, weights: int, zeros: int) -> int:
    """Zeros that a sparsity asks for; where nothing is to be pruned, those of rounding are no fault."""
    return zeros_for(sparsity, weights) if sparsity else zeros


def blocks_asked(record: RunRecord) -> bool:
    """Whether a number of blocks was asked for, which decides the sparsity."""
    return record.recipe.get("allocation", {}).get("blocks") is not None


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read several folders as `load_run` does.

    Raises:
        BesaError: one is named twice, or as `load_run`.
    """
    places = [path_of(path).resolve() for path in paths]
    for at, path in enumerate(paths):
        if places[at] in places[:at]:
            raise BesaError(f"{path} is named twice: name each run once.")
    return [load_run(path) for path in paths]


def load_run(path: Path) -> Run:
    """Read a folder that `besa prune` wrote, that `besa eval` measured, or both; and what `besa simulate` found of it.

    Raises:
        BesaError: there is no such folder, it holds neither file, or a file is of another model or not what its name
            says.
    """
    if not path_of(path).is_dir():
        raise BesaError(f"{path} is not a folder: give one that `besa prune` or `besa eval` wrote to.")
    check_regular(path)
    form = form_of(path)
    record, evaluation = RunRecord.of(path), path / EVALUATION_NAME
    bench, simulation = path / BENCH_NAME, path / SIMULATION_NAME
    if record is None and not evaluation.exists():
        raise BesaError(
            f"{path} holds neither {RECORD_NAME} nor {EVALUATION_NAME}: give a folder that `besa prune` or `besa eval` "
            "wrote to."
        )
    measured = Evaluation.read(evaluation) if evaluation.exists() else None
    simulated = read_result(simulation, Simulation, "simulation", "simulate") if simulation.exists() else None
    if measured is not None and not measured.may_be_of(path):
        raise _of_another(evaluation, "measured", "eval")
    if simulated is not None and not same_files(simulated.fingerprint, path):
        raise _of_another(simulation, "simulated", "simulate")
    return Run(
        folder=path,
        record=record,
        measured=measured,
        bench=read_result(bench, Bench, "measurement of speed", "bench") if bench.exists() else None,
        simulated=simulated,
        form=form,
    )


def _of_another(file: Path, done: str, command: str) -> BesaError:
    return BesaError(f"{file} was {done} on another model: run `besa {command} {file.parent} --json {file}` again.")


def labels(runs: list[Run]) -> list[str]:
    """A name for each run, all distinct: the recipe's, then with sparsity, then with folder, then with a number."""
    more: list[Callable[[Run], str]] = [
        lambda run: f" {100 * run.target:.6g} %" if run.target else "",
        lambda run: f" ({run.folder_name})" if run.folder_name != run.name else "",
        lambda run: f" in {printable(run.folder.resolve().parent.name)}",
    ]
    names = [run.name for run in runs]
    for detail in more:
        counts = Counter(names)
        longer = [name + detail(run) if counts[name] > 1 else name for name, run in zip(names, runs, strict=True)]
        names = longer if len(set(longer)) > len(set(names)) else names
    counts = Counter(names)
    numbered = (f"{name} #{names[:i].count(name) + 1}" for i, name in enumerate(names))
    return [new if counts[name] > 1 else name for name, new in zip(names, numbered, strict=True)]
