"""Figure 1a of the paper: how pruning errors add up over the blocks, layer by layer and with BESA.

    python -m experiments.all --only fig1a

Errors are those of the run records: on sequences that the methods were calibrated on, half of their tokens.
"""

from experiments.experiment import (
    ERRORS,
    Case,
    Experiment,
    Found,
    Options,
    block_errors,
    by_block,
    errors,
    numbers,
)
from experiments.judging import Verdict, changes, judged, ruled


def cases(options: Options) -> list[Case]:
    """Wanda and BESA."""
    return [Case("wanda", options.baseline("wanda")), Case("besa", options.besa())]


def verdict(found: Found) -> Verdict:
    """BESA's error is below Wanda's in every block, and the gap grows."""
    wanda, besa = ([block_errors(outcome) for outcome in found.outcomes[name]] for name in ("wanda", "besa"))
    by_seed = [changes(ours, theirs) for ours, theirs in zip(besa, wanda, strict=True)]
    blocks = [judged(own, most=0) for own in zip(*by_seed, strict=True)]
    grown = judged([(w[-1] - b[-1]) - (w[0] - b[0]) for w, b in zip(wanda, besa, strict=True)], least=0)
    below = sum(one.mean < 0 for one in blocks)
    last = f"in the last, {numbers(found, ('wanda', 'besa'), ERRORS[-1], 4)}, {blocks[-1].words()}"
    said = f"Below Wanda's in {below} of {len(blocks)} blocks; {last}; the gap grows by {grown.words('', 4)}."
    return ruled(said, [*blocks, grown])


EXPERIMENT = Experiment("fig1a", "Figure 1a: error accumulation", cases, verdict, by_block, texts=(), scores=errors)
