"""What to choose: what each recipe costs and leaves, and what each form of a checkpoint gains."""

import json
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import yaml

from besa.evaluation.domains import ALL
from besa.methods.recipe import Recipe
from besa.planning.passes import forward_passes
from besa.report.markdown import table
from experiments.domains import ORDER

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
MODELS = {
    "SmolLM2-135M": "domains",
    "Gemma 3 270M": "domains-gemma3-270m",
    "Qwen2.5-Coder-1.5B": "domains-qwen2.5-coder-1.5b",
}
SAMPLES, SEQLEN = 64, 512  # for which passes are counted
CHOICE = Path(__file__).parent / "choice.yaml"
DECODE = ROOT / "benchmarks" / "results" / "decode-1B-16.json"
FORMS = {"dense": "dense, as torch computes it", "dense, prepacked": "dense, in oneDNN's layout", "sparse": "packed"}
WORKS = {
    "decode 1": "1 sequence", "decode 4": "4", "decode 16": "16", "prefill 64": "prompt of 64 tokens",
    "prefill 512": "of 512",
}  # fmt: skip


def recipes() -> str:
    """Passes, seconds and perplexity of the recipes that were measured on texts of several kinds, in Markdown."""
    measured = {model: _comparison(name) for model, name in MODELS.items()}
    rows = []
    for name in ORDER:
        recipe = Recipe.load(name)
        moves = recipe.reconstruction.moves_weights or recipe.finetune.moves_weights or recipe.distill.moves_weights
        passes = forward_passes(recipe, SAMPLES, SEQLEN)
        cells = [f"`{name}`", "change" if moves else "stay", f"{passes:.1f}"]
        for rows_of in measured.values():
            one = rows_of.get(name)
            cells += ["", ""] if one is None else [f"{one['seconds']:,.0f}", f"{one['ratios']['domains']:.2f}"]
        rows.append(cells)
    head = ["recipe", "weights that stay", "passes"]
    for model in MODELS:
        head += [f"seconds, {model}", f"× dense, {model}"]
    return f"\n{table(head, rows, words=2)}\n"


def choice() -> str:
    """What to use for which goal, in Markdown; perplexity is the mean of the domains, of the embedded model."""
    measured = _comparison(MODELS["SmolLM2-135M"])
    rows = []
    for entry in yaml.safe_load(CHOICE.read_text(encoding="utf-8")):
        passes, quality = "", entry.get("quality", "")
        if name := entry.get("recipe"):
            passes = f"{forward_passes(Recipe.load(name), SAMPLES, SEQLEN):.1f}"
            quality = f"{measured[name]['mean'][ALL]:,.2f}"
        rows.append([entry["goal"], entry["use"], passes, quality])
    return f"\n{table(['goal', 'use', 'passes', 'perplexity at 50 %'], rows, words=2)}\n"


def forms() -> str:
    """Bytes and speed of a model dense and packed, in Markdown."""
    measured = json.loads(DECODE.read_text(encoding="utf-8"))
    packing, speeds = measured["packing"], measured["times_as_fast"]
    share = packing["file_bytes"] / packing["file_bytes_before"]
    rows = [
        [name, _ratio(share if form == "sparse" else 1), *(_ratio(speeds[work][form]) for work in WORKS)]
        for form, name in FORMS.items()
    ]
    return f"\n{table(['form', 'file', *WORKS.values()], rows)}\n"


def _ratio(value: float) -> str:
    """Two decimals of a recorded ratio; a five is rounded up, as by hand."""
    return str(Decimal(str(value)).quantize(Decimal("0.01"), ROUND_HALF_UP))


def _comparison(name: str) -> dict[str, dict[str, Any]]:
    """The rows of a result by recipe."""
    rows = json.loads((RESULTS / name / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return {row["recipe"]: row for row in rows}
