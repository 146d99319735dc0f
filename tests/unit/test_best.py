"""What is best on held-out sequences stays."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from besa.methods.allocation.best import Best


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(1, 3))
def test_the_first_of_the_lowest_errors_is_kept(errors, in_vain):
    parameter = torch.zeros(3, requires_grad=True)
    best = Best([parameter], lambda: float(errors[int(parameter[0])]), in_vain)
    for place in range(1, len(errors)):
        with torch.no_grad():
            parameter.fill_(place)
        best.look()
        lowest = errors.index(min(errors[: place + 1]))
        assert best.passed == (place - lowest >= in_vain)
    best.restore()
    assert parameter.tolist() == [errors.index(min(errors))] * 3
    assert parameter.requires_grad


def test_an_error_that_is_no_number_is_no_gain():
    errors = iter([1.0, math.nan, 0.5])
    best = Best([torch.zeros(1)], lambda: next(errors), 1)
    best.look()
    assert best.passed
    best.look()
    assert not best.passed
