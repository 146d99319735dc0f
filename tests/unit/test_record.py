"""Run records: read as they were written, and told apart by their times."""

import math

from besa.record import BlockRecord, now


def test_errors_that_are_not_finite_are_read_as_they_were_written() -> None:
    block = BlockRecord(
        index=0,
        name="layers.0",
        weights=4,
        zeros=2,
        sparsity=0.5,
        reconstruction_error=math.inf,
        losses=[1.0, math.nan],
        seconds=1.0,
        linears=[],
    )
    again = BlockRecord.model_validate_json(block.model_dump_json())
    assert again.reconstruction_error == math.inf
    assert again.losses[0] == 1.0
    assert math.isnan(again.losses[1])


def test_runs_of_one_second_have_two_times() -> None:
    assert len({now() for _ in range(20)}) > 1
