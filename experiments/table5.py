"""Table 5 of the paper: what epochs, the step between candidate rates, and the importance metric do to BESA.

python -m experiments.all --only table5 --data wikitext2=FILE --data c4=FILE --data ptb=FILE

An epoch is as many tokens as the calibration set has; steps on parts of sequences are so many more.
"""

from experiments.experiment import DENSE_CASE, Case, Experiment, Found, Options, by_method, numbers
from experiments.judging import Verdict, judged, ruled

STEPS = ("0.1", "0.01", "0.001")
METRICS = {"Weight": "magnitude", "Wanda": "wanda", "SparseGPT": "obs"}
ALIKE = 2.0  # per cent; perplexities that differ by less count as equal, the paper's by at most 1 on WikiText-2 and C4


def epochs(count: float) -> str:
    """The label of so many epochs."""
    return f"{count:g} epoch" + ("" if count == 1 else "s")


def step(size: str) -> str:
    """The label of a step between candidates."""
    return f"step {size}"


def cases(options: Options) -> list[Case]:
    """Three ablations around one setting, which stands in each."""
    samples, seqlen = options.conditions.samples, options.conditions.seqlen
    learner = options.besa().descent
    assert learner is not None
    found = [DENSE_CASE]
    for count in options.points:
        steps = round(count * samples * seqlen / learner.tokens(seqlen))
        unended = ("allocation.tolerance=0",) if steps > samples else ()
        found.append(Case(epochs(count), options.besa(f"allocation.steps={steps}", *unended)))
    return [
        *found,
        *(Case(step(size), options.besa(f"allocation.candidate_step={size}")) for size in STEPS),
        *(Case(label, options.besa(f"importance.method={method}")) for label, method in METRICS.items()),
    ]


def verdict(found: Found) -> Verdict:
    """More epochs and finer steps change little; Wanda's metric is the best, SparseGPT's the worst."""
    groups = [[epochs(count) for count in found.options.points], [step(size) for size in STEPS]]
    alike = {other: judged(found.changes(other, first), -ALIKE, ALIKE) for first, *others in groups for other in others}
    weight, wanda, sparsegpt = METRICS
    order = {
        f"{one} against {other}": judged(found.changes(one, other), most=0)
        for one, other in ((wanda, weight), (weight, sparsegpt))
    }
    said = "; ".join(numbers(found, labels) for labels in (*groups, METRICS))
    told = [f"{label} {one.words()}" for label, one in (alike | order).items()]
    return ruled(
        f"{found.text}: {said}. Against the first of their kind: {', '.join(told)}.",
        list((alike | order).values()),
    )


EXPERIMENT = Experiment(
    "table5",
    "Table 5: epochs, sparsity step, importance metric",
    cases,
    verdict,
    by_method,
    points=(1, 3, 10, 30),
)
