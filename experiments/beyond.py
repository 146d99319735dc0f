"""Past the paper: what other kinds of methods, `fast` and `best` leave of a model, and what they cost.

python -m experiments.all --only beyond --data wikitext2=FILE --data c4=FILE --data ptb=FILE

Costs are forward passes of the calibration set, counted (`besa.planning.passes`); solving for weights comes on top.
"""

from besa.methods.recipe import Recipe
from besa.planning import forward_passes, spending
from besa.report.curves import Curve, Panel
from experiments.experiment import DENSE_CASE, Case, Experiment, Found, Options, at, by_sparsity, head_of
from experiments.judging import Judged, Verdict, judged, ruled, together
from experiments.settings import DEFAULTS

PASSES = 20  # that `best` may take
OURS = "best"
PATTERN = "2:4"
ALPS = "reconstruction={method: admm, rounds: 30, penalty: 0.1, growth: 1.33, hold: 3}"  # in many small steps, as there
PATTERNS = {  # recipe and settings; a pattern leaves no sparsity to share, which is all that `fast` does beyond them
    "magnitude": ("magnitude",),
    "wanda": ("wanda",),
    "sparsegpt": ("sparsegpt",),
    "uniform + admm": ("wanda", ALPS),
    "best": ("best", "targets.method=uniform"),
}


def methods(options: Options, sparsity: float) -> dict[str, Recipe]:
    """Those that meet a sparsity, by name."""
    return {
        **{name: options.baseline(name, sparsity) for name in ("magnitude", "wanda", "sparsegpt")},
        "besa": options.besa(sparsity=sparsity),
        "owl + sparsegpt": Recipe.load("sparsegpt", sparsity, ["targets.method=owl"]),
        "uniform + admm": Recipe.load("wanda", sparsity, [ALPS]),
        "fast": options.baseline("fast", sparsity),
        "best": _spending(options, options.baseline("best", sparsity)),
    }


def cases(options: Options) -> list[Case]:
    """All methods at every sparsity, then those that keep to a pattern."""
    by_name = [(at(name, s), recipe) for s in options.points for name, recipe in methods(options, s).items()]
    for name, (base, *settings) in PATTERNS.items():
        recipe = Recipe.load(base, 0.5, ["allocation.method=nm", *settings])
        by_name.append((f"{name} at {PATTERN}", _spending(options, recipe) if name == OURS else recipe))
    return [DENSE_CASE, *(Case(label, recipe) for label, recipe in by_name)]


def _spending(options: Options, recipe: Recipe) -> Recipe:
    given = options.conditions
    return spending(recipe, PASSES, given.samples, given.seqlen, head_of(given.model))


def verdict(found: Found) -> Verdict:
    """`best` is first in every column of every text."""
    columns = [f"{100 * point:g} %" for point in found.options.points] + [PATTERN]
    said, first = [], 0
    all_of: list[Judged] = []
    for column in columns:
        own = _column(found, column)
        ranked = sorted(own, key=lambda name: own[name][found.text])
        against = [
            judged(found.changes(f"{OURS} at {column}", f"{name} at {column}", text), most=0)
            for name in ranked
            if name != OURS
            for text in found.drawn
        ]
        first += together(one.points for one in against) is True
        all_of += against
        said.append(f"{column}: {', '.join(f'{name} {own[name][found.text]:,.2f}' for name in ranked[:2])}")
    sentence = f"{OURS} is first by the means in {first} of {len(columns)} columns on every text"
    return ruled(f"{sentence}; the first two on {found.text}: {'; '.join(said)}.", all_of)


def _column(found: Found, column: str) -> dict[str, dict[str, float]]:
    """Scores by method."""
    ending = f" at {column}"
    return {label.removesuffix(ending): row.mean for label, row in found.rows.items() if label.endswith(ending)}


def panels(found: Found) -> list[Panel]:
    """Perplexity against sparsity, and at the first sparsity against cost, with the frontier."""
    return [*by_sparsity(found, list(methods(found.options, 0.5))), frontier(found)]


def frontier(found: Found) -> Panel:
    """Perplexity against forward passes at the first sparsity; the line joins what nothing cheaper beats."""
    point, given = found.options.points[0], found.options.conditions
    head, recipes = head_of(given.model), methods(found.options, point)
    cost = {name: forward_passes(one, given.samples, given.seqlen, head=head) for name, one in recipes.items()}
    values = {name: found.score(at(name, point)) for name in cost}
    shown = [name for name in cost if name != "magnitude"]  # so far off that the others would fall into one
    line: list[str] = []
    for name in sorted(shown, key=lambda name: (cost[name], values[name])):
        if not line or values[name] < values[line[-1]]:
            line.append(name)
    edge = Curve("frontier", None, [cost[name] for name in line], [values[name] for name in line])
    points = [Curve(name, c, [cost[name]], [values[name]]) for c, name in enumerate(cost) if name in shown]
    return Panel([edge, *points], f"forward passes at {100 * point:g} %", f"perplexity {found.text}", log_x=True)


EXPERIMENT = Experiment(
    "beyond",
    "Past the paper: equal sparsity, equal data",
    cases,
    verdict,
    panels,
    points=(0.5, 0.6, 0.7),
    settings=(DEFAULTS,),
    claim=f"That {OURS} is first",
)
