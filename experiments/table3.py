"""Table 3 of the paper: pruning and 4-bit quantisation learned together (Joint), against Wanda on a quantised model.

python -m experiments.all --only table3 --data wikitext2=FILE --data c4=FILE --data ptb=FILE
"""

from pathlib import Path

from besa.checkpoint.inspection import inspect
from besa.methods.recipe import Recipe
from besa.models.source import locate
from besa.report.markdown import table
from besa.studies.rows import cell
from besa.studies.workspace import DENSE
from experiments.experiment import DENSE_CASE, Case, Experiment, Found, Made, Options, by_method, numbers
from experiments.judging import Verdict, judged, ruled

BITS = "bits a weight"
JOINT, JOINT_WANDA = "Joint: BESA and clipping learned together", "Joint-Wanda: clipping learned, then Wanda"


def cases(options: Options) -> list[Case]:
    """The paper's two, quantisation alone, and BESA with its weights rounded afterwards."""
    return [
        DENSE_CASE,
        Case("4 bits alone", Recipe.load("int4")),  # nothing is pruned
        Case(JOINT, options.besa(name="besa-int4")),
        Case(JOINT_WANDA, options.baseline("wanda-int4")),
        Case("BESA, then rounded to nearest", options.besa(name="besa-rtn4")),
    ]


def bits(checkpoint: Path) -> dict[str, float]:
    """Bits of a weight in the written files, codes and scales, and its share of zeros."""
    contents = inspect(locate(checkpoint))
    return {BITS: contents.bits_per_weight, "sparsity": contents.sparsity}


def scores(made: Made) -> dict[str, float]:
    """Perplexities, and what the checkpoint holds."""
    return made.scores | made.looked


def verdict(found: Found) -> Verdict:
    """Joint is below Joint-Wanda on every text."""
    against = {text: judged(found.changes(JOINT, JOINT_WANDA, text), most=0) for text in found.drawn}
    said = "; ".join(
        f"{text}: {numbers(found, (JOINT, JOINT_WANDA), text)}, {one.words()}" for text, one in against.items()
    )
    return ruled(f"{said}.", list(against.values()))


def shown(found: Found) -> str:
    """Perplexities beside sparsity and bits as counted in the files."""
    texts, rows = found.drawn, []
    for label, row in found.rows.items():
        about = ["0 %", ""] if label == DENSE else [f"{row.mean['sparsity']:.4%}", f"{row.mean[BITS]:.3f}"]
        seconds = "" if row.seconds is None else f"{row.seconds:,.0f}"
        rows.append([label, *about, *(cell(row, text) for text in texts), seconds])
    return table(["method", "sparsity", BITS, *texts, "seconds"], rows)


EXPERIMENT = Experiment(
    "table3", "Table 3: pruning with 4 bits", cases, verdict, by_method, scores=scores, look=bits, table=shown
)
