"""The text of a model card: what the files of a checkpoint say about it, in words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in its `__all__`

from besa.checkpoint.companions import read_config_json
from besa.checkpoint.measurements import Measurement, Measurements
from besa.data.assets import ASSETS
from besa.data.mixture import MIX, OWN
from besa.models.couplings import CALLED
from besa.models.source import EMBEDDED
from besa.models.structures import WHOLE, stay
from besa.record import EarlierRun, RunRecord
from besa.storage.entry import besa_entry
from besa.storage.names import printable
from besa.storage.weights import SPARSE_STEM, WIDTHS

BEGIN = (
    "<!-- besa: written anew after each measurement, up to the next such line; your own text goes before or after -->"
)
END = "<!-- besa: end of what is written anew -->"
FOLDER = "FOLDER"  # stands for the folder of a checkpoint that has no name yet
SHOWN = 200  # characters of a name in the text
COMMIT = re.compile(r"[0-9a-f]{40}")
KINDS = {  # of calibration texts, for readers of a card
    "c4": "English web text",
    MIX: "web text, encyclopedia, source code, technical text and several languages",
}

Origin = tuple[str | None, str | None]  # of a model: as the user named it, and its commit on the Hub
NOWHERE: Origin = (None, None)


@dataclass(frozen=True)
class About:
    """What the files of a checkpoint say about it.

    Attributes:
        record: of the run; None if it came without one.
        config: content of config.json.
        named: the model it was made from, as the user wrote it.
        commit: of that model on the Hub; None if it came from elsewhere, or that is not known.
        packed: whether linears are stored as bitmasks.
    """

    record: RunRecord | None
    config: Mapping[str, Any]
    named: str
    commit: str | None
    packed: bool

    @classmethod
    def of(cls, folder: Path, origin: Origin = NOWHERE) -> About:
        """What a folder holds.

        Args:
            folder: of the checkpoint.
            origin: of the checkpoint, used where its record does not say so.
        """
        record = RunRecord.known(folder)
        if record is not None:
            origin = record.model.get("source"), record.model.get("revision")
        named, commit = origin
        known = isinstance(commit, str) and COMMIT.fullmatch(commit) is not None
        return cls(
            record,
            read_config_json(folder),
            str(named or ""),
            str(commit) if known else None,
            packed=any(folder.glob(f"{SPARSE_STEM}*.safetensors")),
        )

    @property
    def base(self) -> str | None:
        """The id on the Hub of the model it was made from; None if it came from elsewhere."""
        if self.named == EMBEDDED:
            return ASSETS[EMBEDDED].hub
        if self.commit is None or not self.named:
            return None
        try:
            validate_repo_id(self.named)
        except HFValidationError:
            return None
        return self.named

    @property
    def known_terms(self) -> dict[str, Any]:
        """The licence of the embedded model, which comes without a card."""
        return {"license": ASSETS[EMBEDDED].licence.lower()} if self.named == EMBEDDED else {}

    @property
    def besa(self) -> Mapping[str, Any]:
        """besa's entry in the configuration."""
        return besa_entry(self.config)

    @property
    def coded(self) -> bool:
        """Whether weights are stored as codes."""
        settings = self.config.get("quantization_config")
        if self.packed and isinstance(settings, dict):
            settings = settings.get("codes")
        if self.widths:
            return False
        return bool(settings or self.besa.get("quantization_config"))

    @property
    def tags(self) -> list[str]:
        """The tags of the metadata."""
        tags = ["besa", "pruned", *([] if self._removed_since else ["sparse"])]
        if self.record and self.record.pattern:
            tags.append(self.record.pattern.replace("mixed n:", "n:"))
        if self.record and self.record.bits:
            tags.append(f"{self.record.bits}-bit")
        return [*tags, "bitmask"] if self.packed else tags

    @property
    def title(self) -> str:
        """A short name of the model it was made from: paths of a user's disk are nobody's business."""
        source = self.base or self.named
        return _plain(Path(source).name) or "A model"

    def part(self, measurements: Measurements, name: str | None, licensed: bool) -> str:
        """The text of the card, between its marks.

        Args:
            measurements: all that is known.
            name: of the repository on the Hub; None if there is none.
            licensed: whether the metadata name the licence.
        """
        sections = [
            BEGIN,
            f"# {self.title}, pruned by besa",
            self._introduction(),
            _table(("", ""), self._facts()),
            "## Measured",
            _measured(measurements),
            "## Use",
            self._use(name or FOLDER),
            "## Limits",
            self._limits(measurements, licensed),
        ]
        if self.record:
            text = yaml.safe_dump(self.record.recipe, sort_keys=False, allow_unicode=True)
            summary = "<summary>all settings</summary>"
            sections += ["## Recipe", f"<details>{summary}\n\n{_fenced('yaml', text)}\n\n</details>"]
        return "\n\n".join([*sections, END])

    def _introduction(self) -> str:
        paper = "[BESA](https://arxiv.org/abs/2402.16880)"
        if self.record is None:
            return f"Written by besa ({paper}) from a model that came without a record of how it was pruned."
        share = _percent(self.record.zeros, self.record.weights)
        return (
            f"{self._origin()} with {share} of the weights in the pruned matrices of its decoder blocks set to zero, "
            f"one block after another, by besa ({paper}; the Python package `besa-llm`)."
        )

    def _origin(self) -> str:
        """The model it was made from, with a link if it is on the Hub."""
        return f"[{self.base}](https://huggingface.co/{self.base})" if self.base else _code(self.title)

    def _facts(self) -> Iterable[tuple[str, str]]:
        """What is known for certain: name and value."""
        if self.named:
            at = f", commit `{self.commit[:12]}`" if self.base and self.commit else ""
            yield "made from", self._origin() + at
        record = self.record
        for run in record.earlier if record else ():
            yield "pruned before", _earlier(run)
        if record:
            weights, parameters = record.weights, record.model.get("parameters")
            yield "recipe", f"{_code(record.recipe.get('name'))}, seed {record.seed}"
            when = " before the removal" if self._removed_since else ""
            share = f"{_percent(record.zeros, weights)}: {record.zeros:,} of {weights:,} weights were set to zero"
            yield f"sparsity of the pruned matrices{when}", share
            if isinstance(parameters, int) and parameters > record.dropped:
                left = parameters - record.dropped
                share = f"{_percent(record.zeros, left)} of {left:,}, embeddings included"
                yield f"sparsity of all parameters{when}", share
            if record.dense:
                yield "matrices left dense", ", ".join(map(_code, record.dense))
        if record and record.experts:
            before, after = record.experts
            share = f"{after:,} of {before:,} are left in each of {len(record.mixtures):,} mixtures"
            yield "experts", f"{share}; {record.dropped:,} parameters went with the others"
        if record and record.pattern:
            yield "pattern", f"{record.pattern}, kept weights in groups of consecutive columns"
        if record and record.bits:
            yield "quantised to", f"{record.bits} bits, stored as {'codes' if self.coded else 'plain numbers'}"
        whole = {} if self._removed_since or not record else {each.index: each.structures for each in record.blocks}
        if stays := ", ".join(stay(whole)):
            yield "pruned whole", stays
        for kind, (before, after) in self._removed().items():
            where = "" if kind == WHOLE["blocks"] else " in each block"
            yield "removed", f"{kind} that nothing read: {after:,} of {before:,} are left{where}"
        for kind, numbers in self.widths.items():
            yield "removed", f"{kind} that nothing read: {min(numbers):,} to {max(numbers):,} are left in each block"
        dtype = self.config.get("dtype") or self.config.get("torch_dtype")
        dense = "codes (pack-quantized)" if self.coded else "dense safetensors"
        yield (
            "stored as",
            ("bitmasks and kept values" if self.packed else dense)
            + (f", {_code(dtype)}" if isinstance(dtype, str) else ""),
        )
        if self.besa.get("head") == "int8":
            yield "head and embeddings", "rounded to 8 bits, each row on a grid of its own"
        if record:
            yield "calibrated on", self._calibration()
            if version := record.versions.get("besa"):
                yield "pruned by besa", _code(version)

    def _removed(self) -> dict[str, tuple[int, int]]:
        """Channels and heads in each block before and after `besa shrink`, by what they are called."""
        removed = self.besa.get("shrunk")
        counts = removed.items() if isinstance(removed, dict) else ()
        return {WHOLE[kind]: (pair[0], pair[1]) for kind, pair in counts if kind in WHOLE and _is_pair(pair)}

    @property
    def _removed_since(self) -> bool:
        """Whether something was removed since the record was written."""
        earlier = self.record.earlier if self.record else []
        before = earlier[-1].shrunk if earlier else {}
        return bool(self.widths) or self._removed() != {
            WHOLE[kind]: pair for kind, pair in before.items() if kind in WHOLE
        }

    @property
    def widths(self) -> dict[str, list[int]]:
        """Channels and heads of every block, by what they are called, if blocks have widths of their own."""
        said = self.config.get("quantization_config")
        if not isinstance(said, dict) or said.get("quant_method") != WIDTHS:
            return {}
        return {CALLED[kind]: numbers for kind, numbers in said.items() if kind in CALLED and numbers}

    def _calibration(self) -> str:
        """The calibration texts, without the folders that they were in."""
        assert self.record is not None
        about = self.record.calibration
        parts = about.get("parts") or [{"source": about.get("source") or "tokens of the user's own"}]
        sources = [_text(str(part["source"])) for part in parts]
        sizes = [about.get("samples"), about.get("seqlen")]
        counted = [f"{size:,}" for size in sizes if isinstance(size, int)]
        return (
            (sources[0] if len(sources) == 1 else f"{', '.join(sources[:-1])} and {sources[-1]}")
            + (", as dialogues" if about.get("chat") else "")
            + (f", {counted[0]} sequences of {counted[1]} tokens" if len(counted) == 2 else "")
        )

    def _use(self, name: str) -> str:
        """How to load it."""
        code = "trust_remote_code=True" if "auto_map" in self.config else ""
        flag = " --trust-remote-code" if code else ""
        arguments = f'"{name}"' + (f", {code}" if code else "")
        install = ["transformers", *(["compressed-tensors"] if self.coded else [])]
        lead = (
            "The weights are stored as bitmasks, which transformers reads only where besa is installed (`besa unpack` "
            "makes the folder dense for other programs):"
            if self.packed
            else "Its blocks have widths of their own, which transformers loads only where besa is installed:"
            if self.widths
            else "Plain transformers loads it:"
        )
        python = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({arguments})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({arguments})"
        )
        needs_besa = self.packed or bool(self.widths)
        shell = "" if needs_besa else "pip install besa-llm\n"
        shell += f'besa generate {name} --prompt "Once upon a time"{flag}\nbesa eval {name} --ppl domains{flag}'
        steps = [
            lead,
            _fenced("sh", f"pip install {'besa-llm' if needs_besa else ' '.join(install)}"),
            _fenced("python", python),
            "besa runs and measures it from the command line:",
            _fenced("sh", shell),
        ]
        return "\n\n".join(steps)

    def _limits(self, measurements: Measurements, licensed: bool) -> str:
        """What a reader must not expect."""
        lines = []
        if self.record:
            kind = KINDS.get(str(self.record.calibration.get("source")))
            described = f", which is {kind}," if kind else ""
            lines.append(
                f"The weights to keep were chosen on {self._calibration()}{described} alone. What the model could do "
                "with text of other kinds (such as other languages, mathematics, dialogue) may have suffered more."
            )
        lines.append(
            "Only what stands under *Measured* was measured, and on this model alone: compare with the model it was "
            "made from, under the same conditions, before you rely on it."
            if measurements.rows
            else "Nothing has been measured."
        )
        lines.append(
            "Its safety was not evaluated again: refusals and other behaviour that was trained into the model may have "
            "changed."
        )
        if not self.packed and not self._removed_since:
            lines.append(
                "The zeros alone make the files no smaller and dense products no faster; `besa pack` stores them away."
            )
        if not licensed:
            lines.append("The licence is that of the model it was made from: see there.")
        return "\n".join(f"- {line}" for line in lines)


def _earlier(run: EarlierRun) -> str:
    """A run of besa that had made the model what it was before the last one."""
    parts = [_code(run.recipe)] if run.recipe else []
    if run.sparsity is not None:
        parts.append(f"{round(100 * run.sparsity, 4):g} % of the pruned matrices set to zero")
    if run.seed is not None:
        parts.append(f"seed {run.seed}")
    if run.calibration:
        parts.append(f"calibrated on {' and '.join(map(_text, run.calibration))}")
    if run.created:
        parts.append(_plain(run.created[:10]))
    gone = {WHOLE[kind]: pair for kind, pair in run.shrunk.items() if kind in WHOLE}
    removed = [f"{called} from {before:,} to {after:,}" for called, (before, after) in gone.items()]
    return ", ".join(parts + ([f"then removed: {', '.join(removed)}"] if removed else []))


def _measured(measurements: Measurements) -> str:
    """The numbers as a table, or how to get some."""
    if not measurements.rows:
        command = _fenced("sh", f"besa eval {FOLDER} --ppl wikitext2 --json {FOLDER}/besa_eval.json")
        return f"Nothing yet. This measures a folder, and writes what it finds here:\n\n{command}"
    rows = [
        (
            _code(row.name),
            row.metric,
            _plain(row.basis),
            _number(row),
            "" if row.stderr is None else f"{row.stderr:.4f}",
        )
        for row in measurements.rows
    ]
    by = f"By `besa eval` of {_code(measurements.version or 'an unknown version')}"
    by += f", {_plain(measurements.date[:10])}." if measurements.date else "."
    notes = "".join(f"\n- {_plain(note)}" for note in measurements.notes)
    return f"{_table(('data', 'metric', 'measured on', 'value', '±'), rows)}\n\n{by}" + (notes and f"\n{notes}")


def _number(row: Measurement) -> str:
    if not math.isfinite(row.value):
        return "∞"
    return f"{row.value:,.2f}" if row.metric == "perplexity" else f"{row.value:.4f}"


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(number, int) for number in pair)


def _percent(part: int, whole: int) -> str:
    """A share in per cent with all its digits, or with four if it has more than five."""
    share = 100 * part / max(1, whole)
    digits = next((digits for digits in range(6) if round(share, digits) == share), 4)
    return f"{share:.{digits}f} %"


def _plain(text: object) -> str:
    """Text from elsewhere, in one line that Markdown leaves as it is."""
    line = printable(" ".join(str(text).split()))[:SHOWN]
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", line)


def _text(source: str) -> str:
    """A calibration text as a reader knows it."""
    if source == OWN:
        return "text that the dense model wrote"
    return _code(source if source.startswith("hf:") else Path(source).name)


def _code(text: object) -> str:
    """Text from elsewhere, in one line and set as code."""
    line = printable(" ".join(str(text).split()))[:SHOWN].replace("`", "'").replace("|", "\\|")
    return f"`{line}`" if line else ""


def _fenced(language: str, text: str) -> str:
    """A block of code, between fences longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
