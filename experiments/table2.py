"""Table 2 of the paper: zero-shot accuracy of pruned models on six tasks.

python -m experiments.table2 --model smollm2
"""

from besa.evaluation.questions import TASKS
from experiments.experiment import DENSE_CASE, Case, Experiment, Found, Options, Verdict, by_method, numbers
from experiments.running import run

BASELINES = ("sparsegpt", "wanda")


def cases(options: Options) -> list[Case]:
    """The paper's three methods."""
    return [DENSE_CASE, *(Case(name, options.baseline(name)) for name in BASELINES), Case("besa", options.besa())]


def verdict(found: Found) -> Verdict:
    """BESA has the highest mean accuracy."""
    holds = found.score("besa", "accuracy") > max(found.score(name, "accuracy") for name in BASELINES)
    return Verdict(f"Mean accuracy in %: {numbers(found, list(found.rows), 'accuracy')}.", holds)


EXPERIMENT = Experiment("table2", "Table 2: zero-shot accuracy", cases, verdict, by_method, texts=(), tasks=TASKS)

if __name__ == "__main__":
    run(EXPERIMENT)
