"""Run records: read as they were written."""

import math

from besa.record import BlockRecord


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
