"""What a run record says of the machine, and how notices look."""

from contextlib import nullcontext

import pytest
import torch

from besa import cli
from besa.errors import BesaError, Notice
from besa.kernels import native
from besa.kernels.defaults import defaults
from besa.system.machine import loss_scaler, machine, multiplies_bfloat16, multiplying_in, versions


def test_the_machine_tells_what_computes(monkeypatch):
    found = machine(torch.device("cpu"))
    assert found["threads"] == torch.get_num_threads()
    assert found["gpu"] is None
    assert found["kernels"] in ("avx512", "avx2", "plain", "torch")
    assert found["bfloat16"] == multiplies_bfloat16(torch.device("cpu"))
    monkeypatch.setattr(native, "paths", list)
    assert machine(torch.device("cpu"))["kernels"] == "torch"


@pytest.mark.parametrize(("has", "expected"), [({"avx512_bf16": True}, True), ({"avx512_f": True}, False), ({}, False)])
def test_bfloat16_is_what_the_processor_says(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert multiplies_bfloat16(torch.device("cpu")) == expected


@pytest.mark.parametrize(("outputs", "at_least"), [(1, 2**16), (256 * 576, 2**17), (1024 * 8192, 2**23)])
def test_the_scale_of_a_float16_loss_makes_up_for_its_outputs(outputs, at_least):
    """The gradient of a mean is as much smaller as it has more terms, and float16 has none below 6e-8."""
    scaler = loss_scaler(torch.float16, torch.device("cpu"), outputs)
    y = torch.full((outputs,), 0.01, dtype=torch.float16, requires_grad=True)
    scaler.scale(y.float().square().mean()).backward()
    assert scaler.get_scale() >= at_least
    assert y.grad.min() > 0.01
    assert y.grad.isfinite().all()
    assert loss_scaler(torch.bfloat16, torch.device("cpu"), outputs).scale(torch.tensor(3.0)) == 3


def test_products_are_of_the_weights_as_they_are_now():
    """A cache of autocast lives until the outermost context ends, which may be around a whole run."""
    x_TC, w_OC = torch.ones(1, 2), torch.ones(1, 2, requires_grad=True)
    for around in (nullcontext(), defaults(), torch.autocast("cpu", torch.bfloat16)):
        with around:
            found = []
            for _ in range(3):
                with multiplying_in(torch.bfloat16, torch.float32, x_TC.device):
                    found.append(torch.nn.functional.linear(x_TC, w_OC).item())
                with torch.no_grad():
                    w_OC += 1
        assert [found[1] - found[0], found[2] - found[1]] == [2, 2]


def test_code_that_does_not_run_with_other_products_gets_a_sentence():
    """As X-MOD's, which puts a product into a tensor of the model's dtype by a mask."""
    y_TC, weight = torch.zeros(2, 3), torch.ones(3, 3)
    for stored, dtype in ((torch.float32, torch.bfloat16), (torch.float32, torch.float32)):
        with multiplying_in(dtype, stored, y_TC.device):
            assert torch.nn.functional.linear(y_TC, weight).dtype == dtype
    with (
        pytest.raises(BesaError, match=r"products in bfloat16 \(Index put .*--dtype bfloat16"),
        multiplying_in(torch.bfloat16, torch.float32, y_TC.device),
    ):
        y_TC[torch.tensor([True, False])] = torch.nn.functional.linear(y_TC[:1], weight)


def test_versions():
    assert set(versions()) == {"besa", "python", "torch", "transformers", "numpy"}


def test_a_notice_is_a_line_and_other_warnings_are_what_python_says(capsys):
    cli._note(Notice("slower than it could be."), Notice, "somewhere.py", 3)
    assert capsys.readouterr().err == "besa: slower than it could be.\n"
    cli._note("old", DeprecationWarning, "somewhere.py", 3)
    assert "somewhere.py:3: DeprecationWarning: old" in capsys.readouterr().err
