"""A run of the program itself at any size, without numbers: every operator on the device is seen, none is computed.

It stands on the pretend accelerator of the tests (tests/pretend.py), with tensors on the meta device behind it. Where
the program reads a number from the device, it gets one with which it goes on. So the counts are those of the program as
it is: its loops, its settings, its copies. Nothing is worked out by hand but the operations of an operator.

    python -m benchmarks.weightless < question.json    # for programs that use a real GPU, which this would disturb
"""

from __future__ import annotations

import json
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import astuple
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from benchmarks.operations import Operation, Seen
from besa import kernels
from besa.api import default_batch
from besa.data.calibration import Calibration
from besa.methods.recipe import Recipe
from besa.models.activations import Room
from besa.models.blocks import Block
from besa.models.streaming import DecoderInMemory, _outside
from besa.models.visiting import visiting
from besa.pruning import loop, preparing
from besa.pruning.paths import Resources
from besa.system import ranks
from tests import pretend
from tests.pretend import Pretend

PICKING = {"aten::index", "aten::index_select", "aten::gather", "aten::embedding"}  # read only what they return
FREE = {"aten::detach", "aten::alias"}
PLAIN_TOLIST, PLAIN_ADDRESS = pretend._tolist, pretend._data_ptr


class Trace:
    """Sees what runs on the device while it is open.

    Attributes:
        phases: what was seen, by phase.
        phase: the present one.
    """

    def __init__(self) -> None:
        self.phases: dict[str, Seen] = {}
        self.phase = "before"
        self._live = 0
        self._holders: Counter[int] = Counter()

    @contextmanager
    def open(self) -> Iterator[Trace]:
        """While open, the pretend accelerator computes shapes alone and tells this trace."""
        plain_init, plain_count = Pretend.__init__, pretend._count
        with ExitStack() as stack:
            for name, other in (
                ("compute", _shapes),
                ("_tolist", self._told),
                ("_data_ptr", _address),
                ("_count", lambda *arguments: self._see(plain_count, *arguments)),
            ):
                stack.enter_context(mock.patch.object(pretend, name, other))
            stack.enter_context(mock.patch.object(torch, "_fused_sdp_choice", lambda *_, **__: pretend.FLASH))
            stack.enter_context(
                mock.patch.object(Pretend, "__init__", lambda one, raw: self._hold(plain_init, one, raw))
            )
            yield self

    @contextmanager
    def watch(self, phase: str) -> Iterator[None]:
        """While open, what runs belongs to a phase."""
        before, self.phase = self.phase, phase
        sent = ranks.sent()
        try:
            yield
        finally:
            self._seen.sent += ranks.sent() - sent
            self.phase = before

    @contextmanager
    def ranks(self, count: int) -> Iterator[None]:
        """While open, this process is the last of so many ranks, none of which has more sequences."""

        def exchanging(does: Callable[..., None]) -> Callable[..., None]:
            def exchange(*arguments: Any) -> None:
                self._seen.exchanges += 1
                does(*arguments)

            return exchange

        def gather(parts: list[Tensor], own: Tensor) -> None:
            for part in parts:
                part.copy_(own)

        with ExitStack() as stack:
            stack.enter_context(ranks.together(count - 1, count, 1))
            stack.enter_context(mock.patch.object(ranks, "from_first", lambda thing: thing))
            stack.enter_context(mock.patch.object(ranks, "WIRED", ("cpu", pretend.DEVICE.type)))
            for name, does in (("all_reduce", lambda _: None), ("all_gather", gather)):
                stack.enter_context(mock.patch.object(torch.distributed, name, exchanging(does)))
            yield

    @property
    def _seen(self) -> Seen:
        return self.phases.setdefault(self.phase, Seen())

    def transfer(self, to_device: int = 0, to_host: int = 0) -> None:
        """Count bytes that travel."""
        self._seen.to_device += to_device
        self._seen.to_host += to_host

    def _see(
        self, count: Callable[..., None], func: Any, name: str, args: Any, kwargs: Any, out: Any, *rest: Any
    ) -> None:
        before = pretend.counts.syncs.total(), len(pretend.counts.to_device), len(pretend.counts.to_host)
        launched = pretend.counts.launches.total()
        count(func, name, args, kwargs, out, *rest)
        self._seen.syncs += pretend.counts.syncs.total() - before[0]
        self._seen.to_device += sum(pretend.counts.to_device[before[1] :])
        self._seen.to_host += sum(pretend.counts.to_host[before[2] :])
        if pretend.counts.launches.total() > launched and name not in FREE:
            self._seen.operations[_operation(name, args, kwargs, out)] += 1

    def _told(self, tensor: Tensor) -> Any:
        """What `tolist` gives; the host waits."""
        if not tensor.is_meta:
            return PLAIN_TOLIST(tensor)
        self._seen.syncs += 1
        self._seen.to_host += tensor.nbytes
        return PLAIN_TOLIST(torch.tensor(_plausible(tensor)).reshape(tensor.shape))

    def _hold(self, init: Callable[..., None], one: Pretend, raw: Tensor) -> None:
        init(one, raw)
        storage = raw.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self._holders[key]:
            self._live += size
            self._seen.peak = max(self._seen.peak, self._live)
        self._holders[key] += 1
        weakref.finalize(one, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self._live -= size


def _shapes(func: Any, args: Any, kwargs: Any, ends_here: bool) -> Any:
    """What an operator would give, without numbers; only what comes home is on the CPU."""
    name = func._schema.name
    if name == "aten::_local_scalar_dense":
        return _plausible(args[0])[0]
    if name in ("aten::equal", "aten::allclose"):
        return True
    if name == "aten::copy_":
        return args[0]
    if name == "aten::_to_copy" and not ends_here:
        like = {key: kwargs[key] for key in ("dtype",) if kwargs.get(key) is not None}
        size = args[0].numel()
        return (torch.ones_like if size < 1 << 20 else torch.empty_like)(args[0], device="cpu", **like)
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to("meta") if t.dim() else t, (args, kwargs))
    args, kwargs = pytree.tree_map_only(torch.device, lambda _: torch.device("meta"), (args, kwargs))
    return func(*args, **kwargs)


def _address(tensor: Tensor) -> int:
    """What tells apart the memory of tensors that have none."""
    if not tensor.is_meta:
        return PLAIN_ADDRESS(tensor)
    return int(tensor.untyped_storage()._cdata) + tensor.storage_offset() * tensor.itemsize


def _plausible(tensor: Tensor) -> list[Any]:
    """Numbers with which the program goes on: nothing is refused, nothing has converged."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename.endswith(("weightless.py", "pretend.py")) or "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    size, asked = tensor.numel(), frame.f_code.co_name
    if asked == "see":  # of models.check: whether finite, difference, tokens that look ahead
        return [1.0, 0.0, 0.0] * (size // 3)
    if asked == "apportion":  # zeros already there, weights, and whether rates are finite
        return [0, 1 << 60, 1]
    if tensor.dtype == torch.bool:
        return [True] * size
    return [1 / (1 + place) for place in range(size)] if tensor.is_floating_point() else [0] * size


def _operation(name: str, args: Any, kwargs: Any, out: Any) -> Operation:
    inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    outputs = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
    read, written = sum(map(_bytes, inputs)), sum(map(_bytes, outputs))
    if name.startswith("besa::") and not outputs:  # they write to an argument
        written = max(map(_bytes, inputs))
    if name in PICKING:
        read = written + sum(_bytes(t) for t in inputs if not t.is_floating_point())
    if name == "aten::sort":
        read = written = inputs[0].itemsize * sum(map(_bytes, outputs))  # a radix sort passes once for each byte
    flops = _flops(name, inputs, outputs, args)
    kind = "other"
    if flops:
        precise = torch.backends.cuda.matmul.fp32_precision != "tf32"
        kind = "half" if inputs[0].itemsize == 2 else "float32" if precise else "tf32"
    return Operation(name.removeprefix("aten::"), kind, flops, read + written)


def _bytes(tensor: Tensor) -> int:
    """Of the numbers that are there; a dimension of stride 0 repeats them."""
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride else 1
    return numel * tensor.itemsize


def _flops(name: str, inputs: list[Tensor], outputs: list[Tensor], args: Any) -> float:
    """Of matrix products, attention and factorisations."""
    if name in ("aten::mm", "aten::bmm"):
        return 2.0 * inputs[0].numel() * inputs[1].shape[-1]
    if name in ("aten::addmm", "aten::addmm_", "aten::baddbmm"):
        return 2.0 * inputs[1].numel() * inputs[2].shape[-1]
    if "flash_attention" in name:  # query and key times all keys; half of it under a causal mask
        backward = name.endswith("backward")
        query, key = inputs[1 if backward else 0], inputs[2 if backward else 1]
        causal = any(argument is True for argument in args)
        return 4.0 * query.numel() * key.shape[-2] * (0.5 if causal else 1) * (2.5 if backward else 1)
    if name.startswith("aten::linalg_cholesky"):
        return inputs[0].shape[-1] ** 3 / 3
    if name == "aten::cholesky_inverse":
        return 2 * inputs[0].shape[-1] ** 3 / 3
    return 0.0


def seen(
    config: PreTrainedConfig, recipe: Recipe, samples: int, seqlen: int, memory: int, count: int = 1
) -> dict[str, Seen]:
    """What a run of `prune_blocks` asks of a device, by phase; without the journal, so nothing is written.

    Args:
        config: of the model.
        recipe: the method.
        samples: calibration sequences.
        seqlen: tokens of each.
        memory: bytes of the device, which decide where hidden states are kept.
        count: of ranks, each on a device of its own; what the last one does is seen.
    """
    trace = Trace()

    class Watch:
        def __init__(self, device: torch.device) -> None:
            self.seconds: dict[str, float] = {}
            self.sent: dict[str, int] = {}

        def __call__(self, phase: str) -> AbstractContextManager[None]:
            return trace.watch(phase)

    pretend.reset()
    device = pretend.DEVICE
    tokens_NT = torch.randint(config.vocab_size, (samples, seqlen), generator=torch.Generator().manual_seed(0))
    size = SimpleNamespace(free=memory, total=memory)
    with ExitStack() as stack:
        stack.enter_context(trace.open())
        stack.enter_context(trace.ranks(count))
        stack.enter_context(mock.patch.object(pretend, "memory", size))
        stack.enter_context(mock.patch.object(loop, "Stopwatch", Watch))
        stack.enter_context(mock.patch.object(preparing, "zeros_present", lambda run: {}))  # counted on the host
        decoder, calibration = WeightlessDecoder(config, trace), Calibration(tokens_NT, "random tokens", 0)
        resources = Resources(default_batch(samples, seqlen, device), device, Room(device))
        loop.prune_blocks(decoder, recipe.settled(count, calibration.samples, {}), calibration, resources=resources)
    return trace.phases


class WeightlessDecoder(DecoderInMemory):
    """A decoder without weights: blocks come to the device as shapes, and their bytes are counted there and back.

    Args:
        config: of the model.
        trace: counts them.
    """

    def __init__(self, config: PreTrainedConfig, trace: Trace) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        for module in model.modules():  # rotary frequencies are real numbers
            if "RotaryEmbedding" in type(module).__name__:
                module.__init__(config, device="cpu")  # type: ignore[misc]
        super().__init__(model.eval().requires_grad_(False))
        self._trace = trace

    @contextmanager
    def embeddings(self, device: torch.device) -> Iterator[None]:
        """See `Decoder`."""
        with self._there(_outside(self.model.base_model, self.blocks), device):
            yield

    @contextmanager
    def outside_blocks(self, device: torch.device) -> Iterator[None]:
        """See `Decoder`."""
        with self._there(_outside(self.model, self.blocks), device):
            yield

    @contextmanager
    def opened(self, block: Block, device: torch.device) -> Iterator[None]:
        """See `Decoder`."""
        with self._there(list(block.module.modules()), device):
            yield

    @contextmanager
    def _there(self, modules: list[nn.Module], device: torch.device) -> Iterator[None]:
        before = [dict(module._parameters) for module in modules]
        for module in modules:
            for name, home in module._parameters.items():
                if home is not None:
                    self._trace.transfer(to_device=home.nbytes)
                    module._parameters[name] = nn.Parameter(Pretend(torch.empty_like(home)), requires_grad=False)
        try:
            with visiting(modules, device):
                yield
        finally:
            for module, parameters in zip(modules, before, strict=True):
                module._parameters.update(parameters)


assert kernels  # it defines the operators
_META = torch.library.Library("besa", "IMPL")
for _name in (
    "masked",
    "binned",
    "spread",
    "gathered",
    "quantized",
    "swept",
    "add_squares",
):  # they write to an argument
    _META.impl(_name, lambda *_: None, "Meta")
_META.impl("pruned_ranks", lambda alpha, *_: torch.empty_like(alpha, dtype=torch.int64), "Meta")
_META.impl("cheapest_counts", lambda ideal, *_: torch.empty_like(ideal), "Meta")
_META.impl("clipping_gradient", lambda gradient, w, logits, *_: torch.empty_like(logits), "Meta")
_META.impl("histogram", lambda values, bins: values.new_empty(bins, dtype=torch.int64), "Meta")


def main() -> None:
    """Answer one question: the operations of each phase, as lists of name, kind, flops, bytes and times."""
    asked = json.load(sys.stdin)
    settings = AutoConfig.for_model(**asked["config"])
    recipe = Recipe.model_validate(asked["recipe"])
    phases = seen(settings, recipe, asked["samples"], asked["seqlen"], asked["memory"])
    json.dump(
        {
            name: [[*astuple(operation), times] for operation, times in found.operations.items()]
            for name, found in phases.items()
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
