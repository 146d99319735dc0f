"""How long cells will take: forward passes and tokens to measure, at the speed of those that are done."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

from besa.planning import forward_passes
from experiments.experiment import Case, Options

QUESTION = 320  # tokens of a zero-shot question with all its answers, about
WHOLE_TEXT = 600  # windows of a text that is measured whole, about
SOLVING = 90_000  # tokens whose passes take as long as solving for the weights of a model, about
# A token through a weight of a model on one core of an AMD EPYC in bfloat16; a first guess, of the records in
# results/domains*: BESA's 10.8 passes over 16 × 512 tokens took 88 s on SmolLM2, and 759 s on Qwen2.5-Coder-1.5B.
SECONDS = 7e-12
WEIGHTS = {"smollm2": 1.35e8, "gemma3-270m": 2.7e8, "qwen2.5-coder-1.5b": 1.54e9}
SMALL = 1e6  # of other models, which are those of the tests


def tokens(case: Case, options: Options) -> float:
    """Tokens that go through the model, each backward pass counted as the plan does, and what solving is worth."""
    given, measures = options.conditions, options.measures
    samples = case.samples or given.samples
    passed = 0.0
    if case.recipe is not None:
        passed = forward_passes(case.recipe, samples, given.seqlen) * samples * given.seqlen
        passed += SOLVING * case.recipe.reconstruction.moves_weights
    texts = len(measures.texts) * measures.window * (measures.max_windows or WHOLE_TEXT)
    return passed + texts + len(measures.tasks) * (measures.limit or 2500) * QUESTION


def seconds_a_token(records: Iterable[tuple[dict[str, Any], float]], model: str) -> float:
    """The speed of cells that are done, given with their tokens; a guess where there are none."""
    known = [record["seconds"] / size for record, size in records if record["seconds"]]
    return median(known) if known else SECONDS * WEIGHTS.get(model, SMALL)
