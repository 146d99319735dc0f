"""What measuring speed found: medians, spread, and the limit that bytes set."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveFloat

from besa.record import Record

BENCH_NAME = "besa_bench.json"
FIRST = "first token"
DENSE, PREPACKED, SPARSE = "dense", "dense, prepacked", "sparse"


class Timing(Record):
    """One kind of work, by one model.

    Attributes:
        work: such as ``decode 4`` (sequences at a time), ``prefill 512`` (tokens) or ``first token``.
        tokens: that one measurement took in or put out.
        seconds: of one measurement, the median.
        low: lower quartile.
        high: upper quartile.
        limit: seconds that it takes at least to read the weights as often as the work needs them.
    """

    work: str
    tokens: int
    seconds: PositiveFloat
    low: PositiveFloat
    high: PositiveFloat
    limit: PositiveFloat

    def paces(self) -> list[str]:
        """Median, quartiles and limit in words: tokens a second, or milliseconds where one token is waited for."""
        seconds = (self.seconds, self.high, self.low, self.limit)
        if self.work == FIRST:
            return [f"{1e3 * value:,.0f} ms" for value in seconds]
        return [f"{self.tokens / value:,.1f}" for value in seconds]


class ModelSpeed(Record):
    """One model in one form.

    Attributes:
        model: as it was named.
        form: how its linears are computed: ``dense`` as torch does it, ``dense, prepacked`` with weights that oneDNN
            has laid out for itself, or ``sparse``.
        dtype: of the model.
        file_bytes: of its weight files.
        resident_bytes: what the process grew by loading and running it; None where it shares weights with another form.
        step_bytes: weights that a decoding step reads.
        timings: by work.
    """

    model: str
    form: str
    dtype: str
    file_bytes: int
    resident_bytes: int | None
    step_bytes: int
    timings: list[Timing]


class Bench(Record):
    """Models beside each other, measured in turn.

    Attributes:
        models: the first one is what the others are compared with, in its fastest form.
        bandwidth: bytes a second that this machine reads at most.
        rounds: measurements of each kind.
        created: when.
        versions: of besa and of what the numbers depend on.
        machine: processor and threads.
    """

    models: list[ModelSpeed] = Field(min_length=1)
    bandwidth: float
    rounds: int
    created: str
    versions: dict[str, str]
    machine: dict[str, Any]

    def works(self) -> list[str]:
        """The kinds of work, in order."""
        return [timing.work for timing in self.models[0].timings]

    def of(self, work: str) -> list[tuple[ModelSpeed, Timing, float]]:
        """Each model with its timing and how many times as fast it is as the first model's fastest form."""
        rows = [(model, timing) for model in self.models for timing in model.timings if timing.work == work]
        best = min(timing.seconds for model, timing in rows if model.model == self.models[0].model)
        return [(model, timing, best / timing.seconds) for model, timing in rows]
