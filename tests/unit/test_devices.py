"""Which device a name means, and that a device which cannot be had is refused in one sentence."""

from types import SimpleNamespace

import pytest
import torch

from besa.counting.precision import widest
from besa.errors import BesaError
from besa.system import devices
from besa.system.devices import (
    CPU,
    available_bytes,
    check_dtype,
    is_available,
    named_device,
    resolve_device,
    synchronize,
    total_bytes,
)
from tests import pretend

USUAL = "use auto, cpu, cuda, cuda:N, mps or xpu."


@pytest.fixture
def two_gpus(monkeypatch):
    """Two CUDA devices, the second of which is the present one; they cannot be used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_the_default_is_the_first_cuda_device(two_gpus):
    assert named_device("auto") == torch.device("cuda:0")


def test_without_one_the_default_is_the_cpu(no_gpu):
    assert named_device("auto") == resolve_device("auto") == CPU


def test_every_device_but_the_cpu_has_an_index(two_gpus):
    """As the tensors on it have."""
    assert named_device("cuda") == torch.device("cuda:1")  # the present one
    assert named_device("cuda:0") == named_device(torch.device("cuda:0")) == torch.device("cuda:0")
    assert named_device("cpu") == named_device("cpu:0") == CPU
    assert named_device("mps") == torch.device("mps:0")
    assert named_device("xpu:3") == torch.device("xpu:3")
    assert named_device("pretend") == pretend.DEVICE


def test_a_device_can_be_named_where_it_is_not(no_gpu):
    assert named_device("cuda") == torch.device("cuda:0")
    assert named_device("cuda:7") == torch.device("cuda:7")


@pytest.mark.parametrize("name", ["tpu", "", "gpu", "cuda:", "cuda:-1", "cuda:x", "cpu cuda", "GPU", "Auto"])
def test_what_torch_does_not_know_is_refused(name):
    for function in (named_device, resolve_device):
        with pytest.raises(BesaError) as refusal:
            function(name)
        assert str(refusal.value) == f"There is no device {name}: {USUAL}"


@pytest.mark.parametrize("name", ["meta", "vulkan", "hpu:0", "xla"])
def test_what_besa_does_not_compute_on_is_refused(name):
    with pytest.raises(BesaError) as refusal:
        resolve_device(name)
    assert str(refusal.value) == f"besa does not compute on {name}: {USUAL}"


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "xpu", "mps"])
def test_what_this_machine_does_not_have_is_refused(name, monkeypatch):
    kind = name.partition(":")[0]
    monkeypatch.setattr(torch.get_device_module(kind), "is_available", lambda: False)
    with pytest.raises(BesaError) as refusal:
        resolve_device(name)
    assert str(refusal.value) == f"There is no {kind.upper()} device that torch can use here: use --device cpu."


def test_an_index_that_does_not_exist_is_refused(two_gpus):
    for name, count in (("cuda:2", 2), ("cpu:1", 1), ("pretend:4", 1)):
        with pytest.raises(BesaError) as refusal:
            resolve_device(name)
        assert str(refusal.value) == f"There is no device {name}: torch finds {count} of this type here, from 0 on."


def test_a_device_that_fails_at_first_use_is_refused(two_gpus, monkeypatch):
    def zeros(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available.\nCompile with …")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(BesaError) as refusal:
        resolve_device("cuda:1")
    assert str(refusal.value) == (
        "torch cannot use cuda:1 here (CUDA error: no kernel image is available): use --device cpu."
    )


def test_any_device_that_torch_can_use_here_may_be_given():
    assert resolve_device("pretend") == resolve_device(pretend.DEVICE) == pretend.DEVICE


def test_what_a_device_cannot_compute_in_is_refused(monkeypatch, request):
    request.addfinalizer(widest.cache_clear)
    check_dtype(torch.float64, pretend.DEVICE)
    widest.cache_clear()
    monkeypatch.setattr(pretend.numbers, "float64", False)
    with pytest.raises(BesaError) as refusal:
        check_dtype(torch.float64, pretend.DEVICE)
    assert str(refusal.value) == "pretend:0 has no float64: use --dtype float32, or --device cpu."
    check_dtype(torch.float32, pretend.DEVICE)


def test_memory_is_that_of_the_device_or_of_the_machine(monkeypatch):
    monkeypatch.setattr(pretend.memory, "free", 123)
    assert (available_bytes(pretend.DEVICE), total_bytes(pretend.DEVICE)) == (123, pretend.MEMORY)
    monkeypatch.setattr(devices.memory, "available_bytes", lambda: 45)
    monkeypatch.setattr(devices.memory, "total_bytes", lambda: 67)
    for device in (CPU, torch.device("mps:0")):
        assert (available_bytes(device), total_bytes(device)) == (45, 67)


def test_a_number_that_no_device_has_is_not_there():
    assert (
        is_available("pretend") and is_available("pretend:0") and is_available(pretend.DEVICE) and is_available("cpu")
    )
    assert not is_available("pretend:1") and not is_available(torch.device("cuda", 99)) and not is_available("nothing")


def test_memory_that_torch_keeps_for_later_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 400)
    assert available_bytes(torch.device("cuda:0")) == 1300


def test_memory_of_a_device_that_does_not_say_what_is_free(monkeypatch):
    def silent(device):
        raise RuntimeError("The device doesn't support querying the available free memory.")

    monkeypatch.setattr(torch.xpu, "mem_get_info", silent)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(total_memory=5000))
    monkeypatch.setattr(torch.xpu, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.xpu, "memory_allocated", lambda device: 400)
    assert available_bytes(torch.device("xpu:0")) == 4600


def test_every_device_is_waited_for_in_its_own_way(monkeypatch):
    waited = []
    monkeypatch.setattr(torch, "mps", SimpleNamespace(synchronize=lambda: waited.append("mps")))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(str(device)))
    for name in ("cpu", "mps:0", "cuda:1"):
        synchronize(torch.device(name))
    assert waited == ["mps", "cuda:1"]
