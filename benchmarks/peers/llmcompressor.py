"""besa beside llm-compressor: the same model, calibration tokens, windows, machine and threads.

    python -m benchmarks.peers.llmcompressor smollm2 --data wikitext2=FILE
    python -m benchmarks.peers.llmcompressor FOLDER --calibration c4

Each run is a process of its own. The results, one JSON and one table, are written after every run; those of an
interrupted call are taken up by the next. llm-compressor is installed at the first call. See README.md.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import besa
from benchmarks.peers.environments import environment
from benchmarks.peers.exactness import exactness
from benchmarks.peers.measuring import Job
from benchmarks.peers.rows import Rows
from besa.cli.options import files_of
from besa.data.calibration import sample
from besa.errors import BesaError
from besa.models.bos import bos_token
from besa.models.loading import load_model, load_tokenizer
from besa.models.source import locate

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGE, RELEASE = "llmcompressor", "0.14.0.1"
OWN, PEER = "besa", "llm-compressor"
HALF, PATTERN = "50 %", "2:4"
DEFAULT = ("c4", "mix")  # calibration
TOKENS = 2048  # of a forward pass, as besa takes them on a CPU
TEMPORARY = Path(tempfile.gettempdir())
app = typer.Typer(help=__doc__, add_completion=False)


@dataclass(frozen=True)
class Contender:
    """A way to prune.

    Attributes:
        maker: ``besa`` or ``llm-compressor``.
        name: of the method in the table.
        pattern: what it leaves.
        method: its name in the program of the maker.
        settings: of the method.
    """

    maker: str
    name: str
    pattern: str
    method: str
    settings: Any


def _peer(name: str, method: str, pattern: str) -> Contender:
    structure = "0:0" if pattern == HALF else pattern
    return Contender(PEER, name, pattern, method, {"sparsity": 0.5, "mask_structure": structure})


NM = "allocation.method=nm"
CONTENDERS = (
    _peer("Wanda", "wanda", HALF),
    Contender(OWN, "wanda", HALF, "wanda", []),
    _peer("SparseGPT", "sparsegpt", HALF),
    Contender(OWN, "sparsegpt", HALF, "sparsegpt", []),
    Contender(OWN, "fast", HALF, "fast", []),
    _peer("SparseGPT", "sparsegpt", PATTERN),
    Contender(OWN, "sparsegpt", PATTERN, "sparsegpt", [NM]),
    _peer("Wanda", "wanda", PATTERN),
    Contender(OWN, "wanda", PATTERN, "wanda", [NM]),
    Contender(OWN, "fast", PATTERN, "fast", [NM, "targets.method=uniform"]),
    Contender(OWN, "besa", HALF, "besa", []),
    Contender(OWN, "wanda, then admm", HALF, "wanda", ["reconstruction.method=admm"]),
)


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="As `besa prune` takes it.")],
    data: Annotated[list[str] | None, typer.Option(help="NAME=FILE of a test set, as `besa eval` takes it.")] = None,
    calibration: Annotated[list[str] | None, typer.Option(help="Texts to calibrate on (repeatable): c4, mix.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 16,
    seqlen: Annotated[int, typer.Option(help="Tokens of each, and of a window.")] = 512,
    windows: Annotated[int, typer.Option(help="Windows of each text.")] = 6,
    dtype: str = "bfloat16",
    folder: Annotated[Path, typer.Option(help="Where models are written; needs three times their size.")] = TEMPORARY,
) -> None:
    """Prune by every method, and measure what is left."""
    python = environment(PACKAGE, RELEASE)
    source = locate(model).local()
    tokenizer = load_tokenizer(source)
    texts = Texts(("domains", "wikitext2"), files_of(data), seqlen, windows)
    conditions = {
        "model": model,
        "calibration": f"{samples} × {seqlen} tokens",
        "dtype": dtype,
        "perplexity": texts.about(),
        "peer": f"{PACKAGE} {RELEASE}",
    }
    rows = Rows(RESULTS / f"peers-llmcompressor-{Path(model).name}", conditions)
    place = Path(tempfile.mkdtemp(prefix="besa-peers-", dir=folder))
    try:
        dense = load_model(source, dtype)
        dense.save_pretrained(place / "dense")
        tokenizer.save_pretrained(place / "dense")
        if not rows.found:
            rows.add(
                {"maker": OWN, "method": "dense", "pattern": "", "calibration": ""} | texts.measured(dense, tokenizer)
            )
        first = bos_token("auto", tokenizer, dense.config)
        del dense
        for text in calibration or DEFAULT:
            tokens_NT = sample(text, tokenizer, samples, seqlen, 0, bos=first).tokens_NT
            save_file({"tokens": tokens_NT}, place / "tokens")
            for contender in CONTENDERS:
                about = {"maker": contender.maker, "method": contender.name, "pattern": contender.pattern}
                about |= {"calibration": text}
                if rows.holds(about):
                    continue
                ran = _ran(contender, place, python, max(1, TOKENS // seqlen))
                pruned = besa.load(place / "out", device="cpu")
                exact = exactness(pruned, 0.5, 4 if contender.pattern == PATTERN else None)
                rows.add(about | ran | {"zeros": exact} | texts.measured(pruned, tokenizer))
                del pruned
                shutil.rmtree(place / "out")
    finally:
        shutil.rmtree(place)


@dataclass(frozen=True)
class Texts:
    """What perplexity is measured on, as `besa eval` does.

    Attributes:
        names: of the texts.
        files: of test sets, by name.
        window: tokens of a window.
        windows: of each text.
    """

    names: Sequence[str]
    files: Mapping[str, str]
    window: int
    windows: int

    def about(self) -> str:
        """What it is, for the record."""
        return f"{self.windows} windows of {self.window} tokens of {', '.join(self.names)}"

    def measured(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Perplexities by text, and the geometric mean of the domains."""
        found = besa.evaluate(
            model,
            self.names,
            data=self.files,
            window=self.window,
            max_windows=self.windows,
            tokenizer=tokenizer,
            device="cpu",
        )
        return {"perplexity": found.perplexity | {"domains": found.domains}}


def _ran(contender: Contender, place: Path, python: Path, batch: int) -> dict[str, Any]:
    """Prune the dense model of a place to its ``out``, in a process of its own; returns what it took.

    Raises:
        BesaError: the process fails.
    """
    job = Job(
        str(place / "dense"),
        str(place / "tokens"),
        str(place / "out"),
        batch,
        contender.method,
        contender.settings,
    )
    (place / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
    own = contender.maker == OWN
    command = [sys.executable if own else str(python), "-m", f"benchmarks.peers.{'own' if own else 'oneshot'}"]
    paths = [ROOT, Path(besa.__file__).parents[1]] if own else [ROOT]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "BESA_AUTOLOAD": "0"}
    ran = subprocess.run([*command, str(place / "job.json")], capture_output=True, text=True, env=environ, check=False)
    if ran.returncode:
        raise BesaError(f"{contender.maker}, {contender.name}, {contender.pattern} failed: {ran.stderr.strip()[-400:]}")
    found: dict[str, Any] = json.loads((place / "job.done").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    app()
