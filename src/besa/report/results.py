"""The results table, the headline and what a reader must be warned of, all computed from the runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from besa.record import RunRecord
from besa.report import wording
from besa.report.runs import Run
from besa.storage.names import pinned


@dataclass(frozen=True, eq=False)
class Entry:
    """A run on the page.

    Attributes:
        label: its name on the page.
        run: itself.
        color: its place among the colours, None for dense models.
        folder: its name in commands, where it is a folder.
    """

    label: str
    run: Run
    color: int | None
    folder: str

    @property
    def sparsity(self) -> str:
        """Share of zeros as counted, with more digits where it is not what was asked for."""
        if self.run.dense:
            return wording.NO_VALUE
        target = self.run.target or 0.0
        counted = self.run.record.sparsity if self.run.record else target
        if self.run.exact or counted == target:
            return wording.tidy_percent(target)
        return wording.percent_unlike(counted, target)

    @property
    def kept(self) -> str:
        """The sparsity, and the pattern and the bits of the kept weights if they have any."""
        record = self.run.record
        more = [record.pattern, f"{record.bits} bits" if record.bits else None] if record else []
        return ", ".join([self.sparsity, *(one for one in more if one)])


Pruned = list[tuple[Entry, RunRecord]]


@dataclass(frozen=True)
class Cell:
    """One perplexity.

    Attributes:
        value: the perplexity.
        ratio: to dense, None where there is nothing to compare with.
        best: lowest of several pruned models of one sparsity.
    """

    value: float
    ratio: float | None
    best: bool


def texts(entries: list[Entry]) -> list[str]:
    """Names of all texts, in the order of their first appearance."""
    return list(dict.fromkeys(text for entry in entries for text in entry.run.texts))


def windows(entries: list[Entry]) -> list[int]:
    """Window lengths in use."""
    return sorted({e.run.measured.window for e in entries if e.run.measured and e.run.measured.perplexity})


def reference(entries: list[Entry], text: str, like: Run | None = None) -> float | None:
    """Perplexity of the first dense model on the text, if `like` is given one that it was made of and compares with."""
    measured = [entry.run for entry in entries if entry.run.dense and entry.run.perplexity(text) is not None]
    if like is not None:
        measured = [run for run in measured if run.origin.may_be(like.origin) and run.compares(like, text)]
    found = measured[0].perplexity(text) if measured else None
    return found if like is None or found is None or math.isfinite(found) else None


def cell(entries: list[Entry], entry: Entry, text: str) -> Cell | None:
    """The perplexity of a run on a text, None if it was not measured."""
    value = entry.run.perplexity(text)
    if value is None:
        return None
    dense = reference(entries, text, entry.run)
    ratio = None if entry.run.dense or dense is None or not math.isfinite(value) else value / dense
    rivals = [rival.run.perplexity(text) or math.inf for rival in _rivals(entries, entry, text)]
    return Cell(value, ratio, bool(rivals) and math.isfinite(value) and value <= min(rivals))


def _rivals(entries: list[Entry], entry: Entry, text: str) -> list[Entry]:
    """Other pruned models that compare with it."""
    return [other for other in entries if other is not entry and entry.run.is_rival(other.run, text)]


def headline(entries: list[Entry]) -> str:
    """The most telling true sentence: the lowest perplexity against that of its best rival, else against dense."""
    pruned = [entry for entry in entries if not entry.run.dense]
    for text in texts(entries):
        value = {e.label: p for e in pruned if (p := e.run.perplexity(text)) is not None and math.isfinite(p)}
        ranked = sorted((e for e in pruned if e.label in value), key=lambda e: value[e.label])
        for ours in ranked:
            if rivals := _rivals(ranked, ours, text):
                return _against(entries, ours, rivals[0], text)
        if ranked:
            return _alone(entries, ranked[0], text)
    for text in texts(entries):
        if endless := [entry.label for entry in pruned if entry.run.perplexity(text) is not None]:
            return f"The perplexity of {wording.listed(endless)} on {text} is infinite."
    if records := [(entry.label, entry.run.record) for entry in pruned if entry.run.record]:
        label, record = records[0]
        zeros, weights = wording.count(record.zeros), wording.count(record.weights)
        return f"{label} set {zeros} of {weights} weights to zero; what that does to perplexity is not known."
    for text in texts(entries):
        return f"The dense model has a perplexity of {_perplexity(reference(entries, text))} on {text}."
    return "Nothing was measured."


def _perplexity(value: float | None) -> str:
    return wording.NO_VALUE if value is None else wording.perplexity(value)


def _against(entries: list[Entry], ours: Entry, rival: Entry, text: str) -> str:
    mine, theirs = ours.run.perplexity(text) or math.nan, rival.run.perplexity(text) or math.nan
    dense = reference(entries, text, ours.run)
    numbers = f"{_perplexity(mine)} against {_perplexity(theirs)}"
    numbers += f"; dense: {_perplexity(dense)}" if dense is not None else ""
    said = f"At {_asked([ours, rival])}, the perplexity of {ours.label} on {text} is "
    return f"{said}{wording.times(mine / theirs)}that of {rival.label} ({numbers})."


def _alone(entries: list[Entry], ours: Entry, text: str) -> str:
    mine, dense = ours.run.perplexity(text) or math.nan, reference(entries, text, ours.run)
    said = f"At {_asked([ours])}, the perplexity of {ours.label} on {text} is {_perplexity(mine)}"
    return said + (f", {wording.times(mine / dense)}that of the dense model ({_perplexity(dense)})." if dense else ".")


def _asked(compared: list[Entry]) -> str:
    """What these runs were asked for; it is the same."""
    exact, record = all(entry.run.exact for entry in compared), compared[0].run.record
    said = compared[0].sparsity if exact else wording.listed(list(dict.fromkeys(one.sparsity for one in compared)))
    experts = record.experts if record else None
    more = [f"{experts[1]:,} of {experts[0]:,} experts"] if experts else []
    more += [record.pattern] if record and record.pattern else []
    more += [f"{record.bits} bits"] if record and record.bits else []
    return f"{'exactly ' if exact else ''}{said} sparsity{f' with {wording.listed(more)}' if more else ''}"


def notes(entries: list[Entry]) -> list[str]:
    """What keeps the numbers from meaning what they seem to mean."""
    parts = [
        _window_notes,
        _text_notes,
        _bos_notes,
        _dtype_notes,
        _coverage_notes,
        _origin_notes,
        _sparsity_notes,
        _form_notes,
        _recorded_notes,
    ]
    return [note for part in parts for note in part(entries)]


def _window_notes(entries: list[Entry]) -> Iterator[str]:
    if len(windows(entries)) > 1:
        users: dict[int, list[str]] = {window: [] for window in windows(entries)}
        for entry in entries:
            if entry.run.measured and entry.run.measured.perplexity:
                users[entry.run.measured.window].append(entry.label)
        parts = "; ".join(f"{window:,} tokens ({wording.listed(labels)})" for window, labels in users.items())
        yield (
            f"Perplexities were measured in windows of different length and do not compare: {parts}. Ratios and bold "
            "type stay within one length."
        )


def _text_notes(entries: list[Entry]) -> Iterator[str]:
    """Texts that have other tokens in other runs, under one name."""
    for text in texts(entries):
        if not all(one.run.same_tokens(other.run, text) for one, other in combinations(entries, 2)):
            yield (
                f"{text} has not the same tokens in all runs, by another text or another tokenizer: perplexities on "
                "different ones do not compare."
            )


def _bos_notes(entries: list[Entry]) -> Iterator[str]:
    """Texts whose windows began with a BOS token in some runs only."""
    for text in texts(entries):
        bases = [
            (entry.label, basis) for entry in entries if text in entry.run.texts and (basis := entry.run.basis(text))
        ]
        began = [label for label, (_, _, bos) in bases if bos]
        if 0 < len(began) < len(bases):
            yield (
                f"Windows of {text} began with a BOS token for {wording.listed(began)} only: perplexities with and "
                "without one do not compare."
            )


def _dtype_notes(entries: list[Entry]) -> Iterator[str]:
    """Models that computed in different formats while they were measured."""
    by_dtype: dict[str, list[str]] = {}
    for entry in entries:
        if entry.run.measured and entry.run.measured.dtype:
            by_dtype.setdefault(entry.run.measured.dtype, []).append(entry.label)
    if len(by_dtype) > 1:
        parts = "; ".join(f"{dtype} ({wording.listed(labels)})" for dtype, labels in by_dtype.items())
        yield f"Models were measured in different formats, so small differences may be rounding: {parts}."


def _coverage_notes(entries: list[Entry]) -> Iterator[str]:
    """Texts of which the runs saw different amounts, windows being equal."""
    for text in texts(entries):
        for window in windows(entries):
            bases = [entry.run.basis(text) for entry in entries if text in entry.run.texts]
            used = dict.fromkeys(str(basis[1] or "unknown") for basis in bases if basis and basis[0] == window)
            if len(used) > 1:
                amounts = f"{wording.listed(list(used))} windows of {window:,} tokens"
                yield f"The runs used different amounts of {text} ({amounts}): perplexities on it do not compare."


def _origin_notes(entries: list[Entry]) -> Iterator[str]:
    records = [entry.run.record for entry in entries if entry.run.record]
    if len({r.model.get("fingerprint") or (r.model.get("source"), r.model.get("revision")) for r in records}) > 1:
        yield "The runs did not prune the same model."
    if len({r.calibration.get("sha256") for r in records}) > 1:
        yield "The runs were not calibrated on the same tokens."
    if len(versions := sorted({r.versions.get("besa", "unknown") for r in records})) > 1:
        yield f"The runs were made by different versions of besa: {wording.listed(versions)}."
    origins = [entry.run.origin for entry in entries if entry.run.record]
    for entry in entries:
        if entry.run.dense and entry.run.measured and origins and not any(map(entry.run.origin.may_be, origins)):
            yield (
                f"{entry.label} was measured on {pinned(entry.run.measured.model, entry.run.measured.revision)}, which "
                "is not the model that was pruned, by its files or its name: ratios to it are left out."
            )
    if any(r.model.get("gguf") for r in records):
        yield (
            "The model comes from a .gguf file: its “dense” weights are dequantised, so the dense perplexity contains "
            "the loss of that quantisation already."
        )


def _sparsity_notes(entries: list[Entry]) -> Iterator[str]:
    for entry in entries:
        if entry.run.record and not entry.run.exact:
            asked = wording.tidy_percent(entry.run.target or 0.0)
            yield f"{entry.label} ended at {entry.sparsity} sparsity, not at the {asked} it was asked for."
        elif not entry.run.dense and not entry.run.record:
            yield f"{entry.label} has no run record: its sparsity is what its checkpoint declares, or was counted."


def _form_notes(entries: list[Entry]) -> Iterator[str]:
    """Checkpoints that are no longer what `besa prune` wrote."""
    for entry in entries:
        if entry.run.record and str(entry.run.form):
            before = ": sparsity and matrices are those before channels, heads or blocks were removed"
            yield f"{entry.label} is {entry.run.form}{before if entry.run.form.shrunk else ''}."


def _recorded_notes(entries: list[Entry]) -> Iterator[str]:
    """What a run or a measurement said to its user."""
    for entry in entries:
        recorded = (entry.run.record, entry.run.measured)
        for note in dict.fromkeys(note for one in recorded if one for note in one.notes):
            yield f"{entry.label}: {note}"
