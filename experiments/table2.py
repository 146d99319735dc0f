"""Table 2 of the paper: zero-shot accuracy of pruned models on six tasks.

python -m experiments.all --only table2
"""

from math import sqrt
from statistics import mean, variance

from besa.data.questions import TASKS
from besa.evaluation.pairing import Paired, against
from experiments.experiment import DENSE_CASE, Case, Experiment, Found, Options, by_method, numbers
from experiments.judging import Judged, Verdict, ruled

BASELINES = ("sparsegpt", "wanda")


def cases(options: Options) -> list[Case]:
    """The paper's three methods."""
    return [DENSE_CASE, *(Case(name, options.baseline(name)) for name in BASELINES), Case("besa", options.besa())]


def verdict(found: Found) -> Verdict:
    """BESA has a higher mean accuracy than either baseline, question by question."""
    compared = {name: lead(found, name) for name in BASELINES}
    said = ", ".join(f"{name} {one.words(' points', 2)}" for name, one in compared.items())
    means = numbers(found, list(found.rows), "accuracy")
    return ruled(f"Mean accuracy in %: {means}; besa against {said}.", list(compared.values()))


def lead(found: Found, name: str) -> Judged:
    """The mean accuracy of BESA less that of a baseline, in points, over all questions with all seeds."""
    each = []
    for ours, theirs in zip(found.outcomes["besa"], found.outcomes[name], strict=True):
        asked, other = ours.evaluation.zero_shot, theirs.evaluation.zero_shot
        pairs = against([asked], other) if asked and other else None
        assert pairs is not None and pairs.mean is not None  # the same questions, asked in one go
        each.append(pairs.mean)
    return _pooled(each)


def _pooled(each: list[Paired]) -> Judged:
    """Over seeds. They ask the same questions, so the error of one is that of all; that of seeds comes on top."""
    means, errors = [100 * one.difference for one in each], [one.stderr for one in each if one.stderr is not None]
    by_seed = variance(means) / len(means) if len(means) > 1 else 0.0
    error = sqrt((100 * max(errors)) ** 2 + by_seed) if errors else None
    return Judged(mean(means), error, each[0].answers, least=0)


EXPERIMENT = Experiment("table2", "Table 2: zero-shot accuracy", cases, verdict, by_method, texts=(), tasks=TASKS)
