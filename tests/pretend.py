"""A pretend accelerator: the CPU's arithmetic behind a device of its own, for tests on machines that have no GPU.

Importing this module makes `torch.device("pretend")` a device like any other. A tensor in the wrong place is an error,
and `numpy()` is refused as CUDA refuses it. Launches, host syncs and bytes between host and device are counted:

- A *launch* is an operator that neither only views nor only allocates. An operator of besa's own counts once.
- A *sync* is a moment in which a GPU's host would wait: it reads a number or a boolean, asks for a size that depends on
  values, or copies to memory that is not pinned.

What it cannot show: speed, streams, asynchrony, order of sums, autocast (a float32 run does not autocast here).

It stands on torch's experimental Python backend: tensors are wrappers, and a fallback runs every operator on the CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
COPIES = {"aten::copy_", "aten::_to_copy", "aten::_local_scalar_dense"}  # their tensors may be in two places
SEEN_BY_HOST = {
    "aten::allclose",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::bincount",
}
ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::resize_"}
QUERIES = {"aten::_fused_sdp_choice"}  # they look at sizes only
MEMORY = 8 << 30  # bytes, all free
FLASH = 1  # of torch's SDPBackend


@dataclass
class Counts:
    """What happened on the device since `reset`."""

    launches: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)
    to_device: list[int] = field(default_factory=list)  # bytes of each copy
    to_host: list[int] = field(default_factory=list)


counts = Counts()
memory = SimpleNamespace(free=MEMORY, total=MEMORY)  # tests may shrink it
numbers = SimpleNamespace(float64=True)  # tests may take it away, as Apple's GPUs have none

_setup_privateuseone_for_python_backend(
    NAME,
    backend_module=SimpleNamespace(
        _is_in_bad_fork=lambda: False,
        is_available=lambda: True,
        is_initialized=lambda: True,
        _lazy_init=lambda: None,
        current_device=lambda: 0,
        device_count=lambda: 1,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        get_device_name=lambda device=None: "pretend accelerator",
        mem_get_info=lambda device=None: (memory.free, memory.total),
        get_device_properties=lambda device=None: SimpleNamespace(total_memory=memory.total),
        synchronize=lambda device=None: None,
        manual_seed_all=lambda seed: None,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
    ),
)
DEVICE = torch.device(NAME, 0)


class Pretend(torch.Tensor):
    """A tensor that says it is elsewhere; `raw` is where its numbers are."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Pretend:
        self = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )
        self.raw = raw
        return self

    def __init__(self, *_: Any) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, *args, **(kwargs or {}))

    def __repr__(self) -> str:
        return f"Pretend({self.raw!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl


def reset() -> None:
    """Count anew."""
    counts.launches, counts.syncs, counts.to_device, counts.to_host = Counter(), Counter(), [], []


def _computed(func: Any, args: Any, kwargs: Any, ends_here: bool) -> Any:
    """What an operator gives for tensors on the CPU."""
    return func(*args, **kwargs)


compute = _computed  # benchmarks/weightless.py computes shapes alone


@torch.inference_mode(False)  # wrappers made in that mode could not be viewed
def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator on the CPU and count it."""
    name = func._schema.name
    flat, spec = pytree.tree_flatten((args, kwargs))
    here = [t for t in flat if isinstance(t, Pretend)]
    if here and name not in COPIES and name != "aten::is_same_size":
        _refuse_mixtures(name, flat)
    device = kwargs.get("device")
    ends_here = torch.device(device).type == NAME if device is not None else bool(here)
    plain = [t.raw if isinstance(t, Pretend) else _on_cpu(t) for t in flat]
    plain_args, plain_kwargs = pytree.tree_unflatten(plain, spec)
    pinned = bool(plain_kwargs.pop("pin_memory", None))
    out = compute(func, plain_args, plain_kwargs, ends_here)
    _count(func, name, args, kwargs, out, bool(here), ends_here, pinned)
    if name == "aten::_local_scalar_dense":
        return out
    if name == "aten::copy_" or _writes_first(func, args, out):
        return args[0]
    if name == "aten::_to_copy" and ends_here != bool(here) and any(out is t for t in plain):
        out = out.clone()
    known = {id(t.raw): t for t in here}

    def wrapped(t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        if ends_here and t.dtype == torch.float64 and not numbers.float64:
            raise TypeError(f"{NAME} has no float64: {name}")
        if id(t) in known:
            return known[id(t)]
        return Pretend(t) if ends_here else t

    return pytree.tree_map(wrapped, out)


def _refuse_mixtures(name: str, flat: list[Any]) -> None:
    """Refuse a tensor on the CPU beside one on the device, unless it is a number; index tensors must be there too."""
    for t in flat:
        if isinstance(t, torch.Tensor) and not isinstance(t, Pretend) and t.dim():
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} got {NAME} and cpu {t.shape}")


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def _writes_first(func: Any, args: Any, out: Any) -> bool:
    in_place = func._schema.name.endswith("_") and not func._schema.name.endswith("__")
    return bool(in_place and args and isinstance(args[0], Pretend) and isinstance(out, torch.Tensor))


def _count(
    func: Any, name: str, args: Any, kwargs: Any, out: Any, starts_here: bool, ends_here: bool, pinned: bool
) -> None:
    """Count an operator as a launch, a sync or a transfer."""
    if name == "aten::_local_scalar_dense":
        counts.syncs[name] += 1
        return
    if name == "aten::copy_":
        starts_here, ends_here = isinstance(args[1], Pretend), isinstance(args[0], Pretend)
        size, waits = args[0].nbytes, not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking")
    elif name == "aten::_to_copy":
        size, waits = out.nbytes, not (pinned or kwargs.get("non_blocking"))
    if name in COPIES and starts_here != ends_here:
        (counts.to_device if ends_here else counts.to_host).append(size)
        if starts_here and waits:
            counts.syncs[name] += 1
        return
    masks = name.startswith("aten::index") and any(
        isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8) for t in pytree.tree_leaves(args[1:2])
    )
    if name in SEEN_BY_HOST or masks:
        counts.syncs[name] += 1
    if not func.is_view and name not in ALLOCATIONS:
        counts.launches[name] += 1


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention by the kernel that the CPU takes, so that both give the same bits; torch would take another one."""
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    raw = [t.raw if isinstance(t, Pretend) else t for t in arguments]
    choice = torch._fused_sdp_choice(*raw, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    if choice == FLASH:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    plain = torch.ops.aten._scaled_dot_product_attention_math
    return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]


_FALLBACK = torch.library.Library("_", "IMPL")
_FALLBACK.fallback(_run, "PrivateUse1")
_FALLBACK.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_ATEN = torch.library.Library("aten", "IMPL")
for _key in ("AutogradPrivateUse1", "PrivateUse1"):  # the second in inference mode
    _ATEN.impl("scaled_dot_product_attention", _attention, _key)
for _name in ("silu_backward", "mish_backward"):  # torch would compose them of other operators
    _ATEN.impl(_name, partial(_run, getattr(torch.ops.aten, _name).default), "PrivateUse1")

# What torch, or a wrapper, cannot answer by itself.
_device_constructors()  # torch keeps this list, which must have the functions themselves and not those put before them
_tolist, _numpy, _data_ptr, _new_tensor, _as_subclass = (
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.data_ptr,
    torch.Tensor.new_tensor,
    torch.Tensor.as_subclass,
)
_tensor = torch.tensor


def _own_tensor(data: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> torch.Tensor:
    if device is None or torch.device(device).type != NAME:
        return _tensor(data, dtype=dtype, device=device, **kwargs)
    return _tensor(data, dtype=dtype, **kwargs).to(device)


def _own_numpy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if isinstance(self, Pretend):
        raise TypeError(f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu() first.")
    return _numpy(self, *args, **kwargs)


def _own_new_tensor(self: torch.Tensor, data: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    if not isinstance(self, Pretend):
        return _new_tensor(self, data, dtype=dtype, device=device, **kwargs)
    return _tensor(data, dtype=dtype or self.dtype).to(device or self.device)


def _own_tolist(self: torch.Tensor) -> Any:
    if isinstance(self, Pretend):
        counts.syncs["tolist"] += 1
        counts.to_host.append(self.raw.nbytes)
        return _tolist(self.raw)
    return _tolist(self)


def _own_data_ptr(self: torch.Tensor) -> int:
    data = self if isinstance(self, Pretend) else self.data
    return _data_ptr(data.raw if isinstance(data, Pretend) else self)


class _Retyped(torch.autograd.Function):
    """A tensor of the device as one of another class; gradients pass."""

    @staticmethod
    def forward(ctx: Any, pretend: Pretend, kind: type[Pretend]) -> Pretend:
        return kind(pretend.raw)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


@cache
def _both(kind: type[torch.Tensor]) -> type[Pretend]:
    return Pretend if kind is torch.Tensor else type(kind.__name__, (kind, Pretend), {})


def _own_as_subclass(self: torch.Tensor, kind: type[torch.Tensor]) -> torch.Tensor:
    if isinstance(self, Pretend):
        retyped: torch.Tensor = _Retyped.apply(self, _both(kind))
        return retyped
    return _as_subclass(self, kind)


torch.tensor = _own_tensor  # type: ignore[assignment]
torch.Tensor.numpy, torch.Tensor.new_tensor = _own_numpy, _own_new_tensor  # type: ignore[method-assign]
torch.Tensor.tolist, torch.Tensor.data_ptr = _own_tolist, _own_data_ptr  # type: ignore[method-assign]
torch.Tensor.as_subclass = _own_as_subclass  # type: ignore[method-assign]


class _HostFloats(TorchDispatchMode):
    """Counts the floating-point operators that the host computes on tensors of more than a few numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.work: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in pytree.tree_leaves((args, kwargs or {}, out)) if isinstance(t, torch.Tensor)]
        name = func._schema.name
        on_host = name not in QUERIES and all(not isinstance(t, Pretend) and t.device.type == "cpu" for t in tensors)
        floats = any(t.is_floating_point() and t.numel() > 64 for t in tensors)
        if tensors and on_host and floats and not func.is_view and name not in ALLOCATIONS | COPIES:
            self.work[name] += max(t.numel() for t in tensors)
        return out


@contextmanager
def host_floats() -> Iterator[Counter[str]]:
    """While open, count floating-point work of the host: numbers by operator."""
    with _HostFloats() as mode:
        yield mode.work
