"""The device of a run: chosen, checked, and asked what any device can be asked."""

from __future__ import annotations

from typing import Any

import torch

from besa.counting.precision import widest
from besa.errors import BesaError
from besa.system import memory, ranks

TYPES = ("cpu", "cuda", "mps", "xpu")
USUAL = "auto, cpu, cuda, cuda:N, mps or xpu"
CPU = torch.device("cpu")


def named_device(name: str | torch.device) -> torch.device:
    """The device of that name, with an index unless it is the CPU; this machine need not have it.

    Args:
        name: ``auto``, which is the first CUDA device that torch can use, else the CPU; a usual name; or any type of
            device that torch can use here. Of several ranks on a machine, each has a device of its own.

    Raises:
        BesaError: torch knows no such device, or besa does not compute on it.
    """
    if name == "auto":
        return torch.device("cuda", ranks.place()) if torch.cuda.is_available() else CPU
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BesaError(f"There is no device {name}: use {USUAL}.") from None
    if device.type not in TYPES and not is_available(device.type):
        raise BesaError(f"besa does not compute on {name}: use {USUAL}.")
    if device.type == "cpu" and not device.index:
        return CPU
    return device if device.index is not None else torch.device(device.type, _present(device.type))


def resolve_device(name: str | torch.device) -> torch.device:
    """The device to compute on, which torch has used once.

    Args:
        name: as for `named_device`.

    Raises:
        BesaError: this machine has no such device, or torch cannot use it.
    """
    device = named_device(name)
    if not is_available(device.type):
        raise BesaError(f"There is no {device.type.upper()} device that torch can use here: use --device cpu.")
    count = torch.get_device_module(device).device_count()
    if device != CPU and ranks.count() > 1:
        _check_own(device, count)
    if (device.index or 0) >= count:
        raise BesaError(f"There is no device {device}: torch finds {count} of this type here, from 0 on.")
    try:
        torch.zeros(1, device=device)  # the first use shows what a driver or a build lacks
        synchronize(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise BesaError(f"torch cannot use {device} here ({reason}): use --device cpu.") from error
    return device


def _check_own(device: torch.device, count: int) -> None:
    """Check that a device is that of this rank, and not of another one beside it.

    Raises:
        BesaError: it is another's, or there are fewer devices than ranks.
    """
    if ranks.place() >= count:
        kind = device.type.upper()
        raise BesaError(
            f"Rank {ranks.number()} has no {kind} device of its own: torch finds {count} here, so start no more "
            "ranks on this machine, or use --device cpu."
        )
    if device.index != ranks.place():
        raise BesaError(
            f"Rank {ranks.number()} computes on {device.type}:{ranks.place()}, not on {device}: use --device "
            f"{device.type}, which gives each rank its own."
        )


def _present(kind: str) -> int:
    """The index of the device of a type that torch uses by default; of several ranks, each has its own."""
    if ranks.count() > 1:
        return ranks.place()
    return int(getattr(torch.get_device_module(kind), "current_device", int)()) if is_available(kind) else 0


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Check that a model of that dtype can be computed on a device.

    Raises:
        BesaError: the device has no such numbers.
    """
    if dtype == torch.float64 and widest(device) != dtype:
        raise BesaError(f"{device} has no float64: use --dtype float32, or --device cpu.")


def is_available(device: str | torch.device) -> bool:
    """Whether torch can use a device on this machine, such as ``cuda:1``, or any of its type, such as ``cuda``."""
    try:
        device = torch.device(device)
        module = torch.get_device_module(device)
        return bool(module.is_available()) and (device.index is None or device.index < module.device_count())
    except RuntimeError:  # torch has no module for it
        return False


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work; the CPU always has."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def available_bytes(device: torch.device) -> int:
    """Bytes that are still free on a device; of the CPU, and of devices that share its memory, of this machine.

    What torch keeps of the device's memory for later tensors counts as free.
    """
    if shares_memory(device):
        return memory.available_bytes()
    module = torch.get_device_module(device)
    kept = module.memory_reserved(device) if hasattr(module, "memory_reserved") else 0
    used = module.memory_allocated(device) if kept else 0
    try:
        free: int = module.mem_get_info(device)[0]
    except RuntimeError:  # some of Intel's drivers do not say what is free
        free = total_bytes(device) - kept
    return free + kept - used


def total_bytes(device: torch.device) -> int:
    """All memory of a device; of the CPU, and of devices that share its memory, of this machine."""
    if shares_memory(device):
        return memory.total_bytes()
    return int(torch.get_device_module(device).get_device_properties(device).total_memory)


def shares_memory(device: torch.device) -> bool:
    """Whether the device computes in the memory of the machine."""
    return device.type in ("cpu", "mps")


def has_streams(device: torch.device) -> bool:
    """Whether copies from and to pinned memory may go by streams of their own while the device computes."""
    return device.type in ("cuda", "xpu")


def device_name(device: torch.device) -> str | None:
    """The name of a GPU or another accelerator; None of the CPU, whose name is the processor's."""
    if device.type == "cpu":
        return None
    ask: Any = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(ask(device)) if ask else device.type
