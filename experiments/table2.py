"""Table 2 of the paper: zero-shot accuracy of pruned models on six tasks.

python -m experiments.table2 --model smollm2
"""

from besa.data.questions import TASKS
from experiments.experiment import DENSE_CASE, Case, Experiment, Found, Options, Verdict, by_method, numbers
from experiments.running import run

BASELINES = ("sparsegpt", "wanda")


def cases(options: Options) -> list[Case]:
    """The paper's three methods."""
    return [DENSE_CASE, *(Case(name, options.baseline(name)) for name in BASELINES), Case("besa", options.besa())]


def verdict(found: Found) -> Verdict:
    """BESA has the highest mean accuracy, by more than the standard error of a mean."""
    best = max(found.score(name, "accuracy") for name in BASELINES)
    lead, error = found.score("besa", "accuracy") - best, _error(found)
    said = (
        f"Mean accuracy in %: {numbers(found, list(found.rows), 'accuracy')}; each has a standard error of {error:.2f}"
    )
    return Verdict(f"{said}.", None if abs(lead) <= error else lead > 0)


def _error(found: Found) -> float:
    """The largest standard error of a mean accuracy, in per cent."""
    asked = [evaluation.zero_shot for own in found.outcomes.values() for one in own for evaluation in one.evaluations]
    return 100 * max((answers.stderr for answers in asked if answers), default=0.0)


EXPERIMENT = Experiment("table2", "Table 2: zero-shot accuracy", cases, verdict, by_method, texts=(), tasks=TASKS)

if __name__ == "__main__":
    run(EXPERIMENT)
