"""What each recipe costs and leaves, and what each form of a checkpoint gains: the tables of docs/recipes.md."""

import json
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from besa.methods.recipe import Recipe
from besa.planning.passes import forward_passes
from besa.report.markdown import table

ROOT = Path(__file__).parent.parent
DOMAINS = ROOT / "experiments" / "results" / "beyond" / "domains"
MODELS = {
    "SmolLM2-135M": "smollm2-16x512",
    "Gemma 3 270M": "gemma3-270m-16x512",
    "Qwen2.5-Coder-1.5B": "qwen2.5-coder-1.5b-16x512",
}
ORDER = ("wanda", "sparsegpt", "besa", "fast", "best")
SAMPLES, SEQLEN = 64, 512  # for which passes are counted
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
    """The rows of a comparison by recipe."""
    rows = json.loads((DOMAINS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return {row["recipe"]: row for row in rows}
