"""The speed of models, measured alternately, so that other load on the machine affects all of them alike.

Shape suffixes: N sequences, T tokens.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from besa.counting.precision import dtype_name
from besa.data.arguments import Count, Dtype, checked
from besa.errors import BesaError
from besa.models.limits import positions
from besa.models.sizes import vocabulary
from besa.models.source import Source, locate, weight_paths
from besa.progress import Progress, silent
from besa.record import now
from besa.runtime.coded import Coded, CodedEmbedding
from besa.runtime.fastest import fastest
from besa.runtime.linear import SparseLinear
from besa.runtime.sparse_models import load_source
from besa.runtime.timings import DENSE, FIRST, SPARSE, Bench, ModelSpeed, Timing
from besa.system import memory
from besa.system.devices import resolve_device, synchronize
from besa.system.machine import machine, versions

DECODE = (1, 4, 16)  # sequences at a time
PREFILL = (64, 512)  # tokens of one prompt
CONTEXT = 8  # tokens before the ones that are decoded
STEPS = 16  # tokens of each sequence that one measurement decodes
READ = 1 << 30  # bytes read to measure the bandwidth, too many for any cache


@dataclass(frozen=True)
class _Work:
    """One kind of work: decoding `steps` tokens of each sequence, or prefilling `tokens` of one sequence."""

    name: str
    sequences: int = 1
    tokens: int = CONTEXT
    steps: int = 0

    @property
    def counted(self) -> int:
        """Number of tokens in one measurement."""
        return self.sequences * (self.steps or self.tokens)

    @property
    def passes(self) -> int:
        """Number of times the weights are read."""
        return self.steps or 1

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether a model has positions for it; before decoding, there is a step that is not measured."""
        return self.tokens + (self.steps and self.steps + 1) <= (positions(model).most or sys.maxsize)


WORKS = [
    *(_Work(f"decode {size}", size, CONTEXT, STEPS) for size in DECODE),
    *(_Work(f"prefill {tokens}", tokens=tokens) for tokens in PREFILL),
    _Work(FIRST, tokens=PREFILL[0]),
]


@dataclass
class _Contender:
    """A model in one form, with its measurements: seconds by work."""

    source: Source
    form: str
    model: PreTrainedModel
    file_bytes: int
    resident_bytes: int | None
    step_bytes: int
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


@checked
def bench(
    models: Sequence[str | Path],
    *,
    rounds: Count = 7,
    device: str | torch.device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Bench:
    """Measure tokens a second in decoding and prefill, and the time to the first token.

    Work for which one of the models has too few positions is left out.

    Each dense model on the CPU also runs in the fastest form of torch there: weights in oneDNN's own layout, or float32
    products where oneDNN has none of the model's dtype. In every round each model does each work once, in turn.
    A warm-up round is not counted.

    Args:
        models: anything `besa.load` takes; the others are compared with the first.
        rounds: measurements of each kind of work.
        device: as in `besa.load`.
        dtype: as in `besa.load`.
        trust_remote_code: as in `besa.load`.
        progress: told about downloads, then (measurements done, measurements, model and work).

    Raises:
        BesaError: a model cannot be read or has hardly any positions, one is named twice, or none is named.
    """
    names = [str(model) for model in models]
    if not names:
        raise BesaError("There is nothing to measure: name a model.")
    device = resolve_device(device)
    sources = [locate(name, progress, trust_remote_code=trust_remote_code).local(progress) for name in names]
    if len({source.pinned for source in sources}) < len(names):
        raise BesaError("A model is named twice: name each once.")
    contenders: list[_Contender] = []
    for source in sources:
        contenders += _contenders(source, device, dtype)
    read = torch.zeros(READ // 4, device=device)
    reading: list[float] = []
    works = [work for work in WORKS if all(work.fits(contender.model) for contender in contenders)]
    total = (rounds + 1) * len(works) * len(contenders)
    done = itertools.count(1)
    for turn in range(rounds + 1):
        for work in works:
            for contender in contenders[:: -1 if turn % 2 else 1]:
                seconds = _measure(contender.model, work)
                if turn:
                    contender.seconds[work.name].append(seconds)
                progress(next(done), total, f"{contender.source.name} {contender.form}, {work.name}")
            reading.append(_timed(device, lambda: read.sum()))
    bandwidth = READ / min(reading)
    return Bench(
        models=[_speed(contender, bandwidth) for contender in contenders],
        bandwidth=bandwidth,
        rounds=rounds,
        created=now(),
        versions=versions(),
        machine=machine(device),
    )


def _contenders(source: Source, device: torch.device, dtype: str) -> list[_Contender]:
    """The forms in which a model can run here.

    Raises:
        BesaError: it has too few positions.
    """
    memory.trim()
    before = _resident(device)
    model = load_source(source, device, dtype)
    if not WORKS[0].fits(model):
        raise BesaError(f"{source.base} has {positions(model).most} positions, too few to measure how fast it decodes.")
    _measure(model, WORKS[0])
    resident = _resident(device) - before
    size = sum(path.stat().st_size for path in weight_paths(source))
    sparse = any(isinstance(module, SparseLinear | Coded) for module in model.modules())
    read = step_bytes(model)
    forms = [_Contender(source, SPARSE if sparse else DENSE, model, size, resident, read)]
    if not sparse and (found := fastest(model)) is not None:
        form, other = found
        forms.append(_Contender(source, form, other, size, None, read))
    return forms


def _resident(device: torch.device) -> int:
    ask = getattr(torch.get_device_module(device), "memory_allocated", None)
    return int(ask(device)) if ask else memory.current_bytes()


@torch.inference_mode()
def _measure(model: PreTrainedModel, work: _Work) -> float:
    """Seconds of one measurement; the tokens, and so the experts of a mixture, are always the same."""
    generator = torch.Generator().manual_seed(0)
    tokens_NT = torch.randint(vocabulary(model), (work.sequences, work.tokens), generator=generator).to(model.device)
    if work.steps:
        return _decode(model, tokens_NT, work.steps)
    if work.name == FIRST:
        mask_NT = torch.ones_like(tokens_NT)
        return _timed(
            model.device,
            lambda: model.generate(tokens_NT, attention_mask=mask_NT, max_new_tokens=1, do_sample=False),
        )
    return _timed(model.device, lambda: model(tokens_NT, logits_to_keep=1))


def _decode(model: PreTrainedModel, tokens_NT: Tensor, steps: int) -> float:
    """Seconds of `steps` greedy steps, after a prefill of the tokens and one more step."""
    output = model(tokens_NT, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values

    def step(next_N1: Tensor) -> Tensor:
        logits_N1V = model(next_N1, past_key_values=cache, use_cache=True).logits
        following_N1: Tensor = logits_N1V.argmax(dim=-1)
        return following_N1

    next_N1 = step(output.logits.argmax(dim=-1))

    def decode() -> None:
        following_N1 = next_N1
        for _ in range(steps):
            following_N1 = step(following_N1)

    return _timed(model.device, decode)


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def step_bytes(model: nn.Module) -> int:
    """Bytes of weights that a decoding step reads.

    Embeddings count only if they are the head too. All experts count.
    """
    tables: set[int] = set()
    heads: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.Linear):
            (tables if isinstance(module, nn.Embedding) else heads).add(id(module.weight))
        elif isinstance(module, Coded):
            codes = {id(module.matrix.codes_OI), id(module.matrix.steps_O1)}
            (tables if isinstance(module, CodedEmbedding) else heads).update(codes)
    read = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(size for key, size in read.items() if key not in tables or key in heads)


def _speed(contender: _Contender, bandwidth: float) -> ModelSpeed:
    timings = []
    for work in (work for work in WORKS if work.name in contender.seconds):
        low, middle, high = _quartiles(contender.seconds[work.name])
        limit = work.passes * contender.step_bytes / bandwidth
        timings.append(Timing(work=work.name, tokens=work.counted, seconds=middle, low=low, high=high, limit=limit))
    return ModelSpeed(
        model=contender.source.base,
        revision=contender.source.revision,
        form=contender.form,
        dtype=dtype_name(contender.model.dtype),
        file_bytes=contender.file_bytes,
        resident_bytes=contender.resident_bytes,
        step_bytes=contender.step_bytes,
        timings=timings,
    )


def _quartiles(seconds: list[float]) -> tuple[float, float, float]:
    if len(seconds) < 2:
        return seconds[0], seconds[0], seconds[0]
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, middle, high
