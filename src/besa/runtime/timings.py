"""The results of measuring speed: medians, quartiles, and the limit set by the bytes that are read."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveFloat

from besa.record import Record
from besa.storage.names import pinned

BENCH_NAME = "besa_bench.json"
FIRST = "first token"
SHORT = 12  # characters of a commit that name it in a table
DENSE, PREPACKED, WIDENED, SPARSE = "dense", "dense, prepacked", "dense, in float32", "sparse"


class Timing(Record):
    """One kind of work, by one model.

    Attributes:
        work: such as ``decode 4`` (sequences at a time), ``prefill 512`` (tokens) or ``first token``.
        tokens: number in one measurement.
        seconds: of one measurement, the median.
        low: lower quartile.
        high: upper quartile.
        limit: lower bound in seconds: the time to read the weights as often as the work needs them.
    """

    work: str
    tokens: int
    seconds: PositiveFloat
    low: PositiveFloat
    high: PositiveFloat
    limit: PositiveFloat

    def paces(self) -> list[str]:
        """Median, quartiles and limit as text: tokens a second, or milliseconds to the first token.

        The smaller quartile comes first: the lower one of times, the upper one of rates.
        """
        if self.work == FIRST:
            return [_milliseconds(value) for value in (self.seconds, self.low, self.high, self.limit)]
        return [f"{self.tokens / value:,.1f}" for value in (self.seconds, self.high, self.low, self.limit)]


def _milliseconds(seconds: float) -> str:
    """Whole ones, or three digits of fewer than ten."""
    number = 1e3 * seconds
    return f"{number:#.3g} ms" if number < 10 else f"{number:,.0f} ms"


class ModelSpeed(Record):
    """One model in one form.

    Attributes:
        model: as the user named it, but for the revision.
        revision: its commit, if it came from the Hugging Face Hub.
        form: how its linears are computed: ``dense`` by torch, ``dense, prepacked`` with weights in oneDNN's
            own layout, ``dense, in float32`` where many rows are multiplied so, or ``sparse``.
        dtype: of the model.
        file_bytes: of its weight files.
        resident_bytes: growth of the process by loading and running it; None if it shares weights with another form.
        step_bytes: bytes of weights that a decoding step reads.
        timings: by work.
    """

    model: str
    revision: str | None = None
    form: str
    dtype: str
    file_bytes: int
    resident_bytes: int | None
    step_bytes: int
    timings: list[Timing]

    @property
    def name(self) -> str:
        """The model's name, with its commit in short: it stands in every line of a table."""
        return pinned(self.model, self.revision and self.revision[:SHORT])


class Bench(Record):
    """Several models, measured in turn.

    Attributes:
        models: the others are compared with the first one in its fastest form.
        bandwidth: bytes a second that this machine can read.
        rounds: measurements of each kind.
        created: when.
        versions: of besa and of the libraries that the numbers depend on.
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
        """Each model with its timing and its speed-up over the first model's fastest form."""
        rows = [(model, timing) for model in self.models for timing in model.timings if timing.work == work]
        best = min(timing.seconds for model, timing in rows if model.name == self.models[0].name)
        return [(model, timing, best / timing.seconds) for model, timing in rows]
