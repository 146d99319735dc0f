"""Table 5 of the paper: what epochs, the step between candidate rates, and the importance metric do to BESA.

python -m experiments.table5 --model smollm2 --data wikitext2=FILE --data c4=FILE --data ptb=FILE
"""

from experiments.experiment import DENSE_CASE, Case, Experiment, Found, Options, Verdict, by_method, numbers
from experiments.running import run

STEPS = ("0.1", "0.01", "0.001")
METRICS = {"Weight": "magnitude", "Wanda": "wanda", "SparseGPT": "obs"}
ALIKE = 0.02  # perplexities that differ by less count as equal; the paper's differ by at most 1 % on WikiText-2 and C4


def epochs(count: float) -> str:
    """The label of so many epochs."""
    return f"{count:g} epoch" + ("" if count == 1 else "s")


def step(size: str) -> str:
    """The label of a step between candidates."""
    return f"step {size}"


def cases(options: Options) -> list[Case]:
    """Three ablations around one setting, which stands in each."""
    samples = options.conditions.samples
    longer = {n: (f"allocation.steps={round(n * samples)}", "allocation.tolerance=0") for n in options.points}
    return [
        DENSE_CASE,
        *(Case(epochs(count), options.besa(*(settings if count > 1 else ()))) for count, settings in longer.items()),
        *(Case(step(size), options.besa(f"allocation.candidate_step={size}")) for size in STEPS),
        *(Case(label, options.besa(f"importance.method={method}")) for label, method in METRICS.items()),
    ]


def verdict(found: Found) -> Verdict:
    """More epochs and finer steps change little; Wanda's metric is the best, SparseGPT's the worst."""
    groups = [[epochs(count) for count in found.options.points], [step(size) for size in STEPS], list(METRICS)]
    spreads = [max(map(found.score, labels)) / min(map(found.score, labels)) - 1 for labels in groups[:2]]
    weight, wanda, sparsegpt = map(found.score, METRICS)
    said = "; ".join(numbers(found, labels) for labels in groups)
    return Verdict(f"{found.text}: {said}.", max(spreads) < ALIKE and wanda < weight < sparsegpt)


EXPERIMENT = Experiment(
    "table5",
    "Table 5: epochs, sparsity step, importance metric",
    cases,
    verdict,
    by_method,
    points=(1, 3, 10, 30),
)

if __name__ == "__main__":
    run(EXPERIMENT)
