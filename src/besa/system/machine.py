"""The machine and software of a run: versions, processor, GPU, and support for bfloat16."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

from besa.counting.precision import dtype_name
from besa.errors import BesaError
from besa.kernels import native
from besa.kernels.operators import triton_works
from besa.kernels.processor import processor
from besa.system.devices import device_name
from besa.version import __version__


def versions() -> dict[str, str]:
    """Versions of besa, Python and the packages that affect the numbers."""
    packages = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {"besa": __version__, "python": platform.python_version(), **packages}


def machine(device: torch.device) -> dict[str, Any]:
    """The machine of a run, for its record: processor, threads, type of the device, a GPU's name, and kernels."""
    return {
        "system": sys.platform,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "gpu": device_name(device),
        "kernels": _kernels(device),
        "bfloat16": multiplies_bfloat16(device),
    }


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices, which is faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return bool(getattr(torch.get_device_module(device), "is_bf16_supported", bool)())
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 lacks the function
    return any(capabilities.get(feature) for feature in ("avx512_bf16", "amx_bf16", "bf16"))


def learning_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a model of `dtype` learns fastest: bfloat16 for float32 if the hardware multiplies it."""
    return torch.bfloat16 if dtype == torch.float32 and multiplies_bfloat16(device) else dtype


@contextmanager
def multiplying_in(dtype: torch.dtype, stored: torch.dtype, device: torch.device) -> Iterator[None]:
    """While open, a model whose weights are of the dtype `stored` multiplies in `dtype` on a device.

    Raises:
        BesaError: code of the model's family does not run with products of another dtype.
    """
    if dtype == stored:
        yield
        return
    try:
        # A cache would outlive the step inside another context of autocast, and serve weights of before it.
        with torch.autocast(device.type, dtype, cache_enabled=False):
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rstrip(".")[:200]
        name = dtype_name(dtype)
        raise BesaError(
            f"The model fails with matrix products in {name} ({reason}): use --dtype {name}, or switch autocast off "
            "(--set allocation.autocast=false, finetune.autocast=false or distill.autocast=false)."
        ) from error


def loss_scaler(dtype: torch.dtype, device: torch.device, outputs: int = 1) -> torch.amp.GradScaler:
    """Scales the loss of a descent in float16, in which many gradients would underflow to zero.

    A step whose gradients overflow is skipped, and the scale is halved. In other dtypes nothing changes.

    Args:
        dtype: of the products.
        device: that computes.
        outputs: numbers that the loss is a mean over. The gradient of each is as much smaller as they are more.
    """
    scale = 2.0 ** max(16, outputs.bit_length())
    return torch.amp.GradScaler(device.type, init_scale=scale, enabled=dtype == torch.float16)


def _kernels(device: torch.device) -> str:
    """What besa's own kernels run as on a device; torch is plain torch in their place."""
    if device.type == "cpu":
        return next(iter(native.paths()), "torch")
    return "triton" if device.type == "cuda" and triton_works(device) else "torch"
