"""Attention modules of packed models: while one sequence is decoded, each is one call of besa's kernel.

Model families implement attention in several ways. What a module computes is found by trying it. A module keeps its
class and its parts; only its `forward` is replaced, and falls back to the family's own where the kernel cannot be used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from besa.kernels import attention
from besa.kernels.decoding import Linear, Norm, Step, Token, serves
from besa.runtime.attention import SDPA, chosen
from besa.runtime.dense import DenseLinear
from besa.runtime.derivatives import wanted
from besa.runtime.growing import room_of
from besa.runtime.kept import Kept
from besa.runtime.linear import SparseLinear
from besa.runtime.norms import kernel_of
from besa.runtime.tracing import tracing

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
UNUSED = {"position_ids", "use_cache", "cache_position"}  # arguments that change nothing in such a module
SIZES = (1.0, 1000.0)  # of the hidden states by which a module is tried: some families clip large numbers
BEFORE = 3  # tokens in the cache by which a module is tried
UNLIKE = (TypeError, ValueError, RuntimeError, AttributeError, LookupError)  # what another kind of module may raise


def speed_up(model: PreTrainedModel) -> None:
    """Let the attention modules of a model decode by besa's kernel where it computes the same."""
    for module in model.modules():
        if "forward" not in vars(module) and all(hasattr(module, name) for name in (*LINEARS, "layer_idx", "scaling")):
            decoder = _decoder(module, model.dtype)
            if decoder is not None:
                module.forward = decoder


def restore(model: nn.Module) -> None:
    """Undo `speed_up`."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), Decoder):
            del module.forward


class Prepared(NamedTuple):
    """A step of an attention module for a token, and the layer of the cache that the token is added to."""

    step: Step
    token: Token
    layer: DynamicLayer


class Decoder:
    """The `forward` of an attention module that has been tried.

    Attributes:
        turned: see below.

    Args:
        module: the attention module.
        turned: the rotary dimension.
    """

    def __init__(self, module: Any, turned: int) -> None:
        self._module, self.turned = module, turned
        self._step = Kept[Step](module, self._made)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """What the family's own `forward` gives."""
        if not inputs and (found := self.decoded(**named)) is not None:
            return found, None
        return type(self._module).forward(self._module, *inputs, **named)

    def decoded(self, hidden_states: Tensor | None = None, **named: Any) -> Tensor | None:
        """The module's output for one more token; None, with nothing changed, if this is no such call.

        Args:
            hidden_states: as the family's own `forward` takes it, as are all others.
            named: see there.
        """
        found = self.prepared(hidden_states, **named)
        if found is None or hidden_states is None:
            return None
        room = room_of(found.layer)
        output = found.step(hidden_states.contiguous(), found.token, room.place)
        room.grow(found.layer)
        return output

    def prepared(
        self,
        hidden_states: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **others: Any,
    ) -> Prepared | None:
        """The arguments of a step for one more token; None if this call is something else.

        Args:
            hidden_states: as the family's own `forward` takes it, as are all others; of a block, the block's.
            position_embeddings: see there.
            attention_mask: see there.
            past_key_values: see there.
            others: see there.
        """
        module = self._module
        if (
            torch.is_grad_enabled()
            or hidden_states is None
            or wanted(hidden_states)
            or position_embeddings is None
            or hidden_states.shape[:2] != (1, 1)
            or module.training
            or tracing()
            or torch.is_autocast_enabled("cpu")
            or _has_any_global_hook()
            or module.config._attn_implementation != SDPA
            or not chosen()
            or not plain(others)
        ):
            return None
        step = self.step(hidden_states.dtype)
        layer = None if step is None else layer_of(past_key_values, module.layer_idx, step)
        if step is None or layer is None or hidden_states.shape != step.shapes[0]:
            return None
        tokens = layer.keys.size(2) + 1
        if attention_mask is not None and not attention.allows(attention_mask, 1, tokens):
            return None
        if not all(each.shape == (1, 1, self.turned) for each in position_embeddings):
            return None
        if not all(each.is_cpu and each.dtype == step.dtype for each in (hidden_states, *position_embeddings)):
            return None
        cosines, sines = (each.contiguous() for each in position_embeddings)
        return Prepared(step, Token((cosines, sines), attention_mask, tokens), layer)

    def step(self, dtype: torch.dtype) -> Step | None:
        """The step for the module as it is now; None if a part has no kernel, or has a hook."""
        return self._step.now(dtype, torch.get_num_threads())

    def _made(self, dtype: torch.dtype, threads: int) -> Step | None:
        assert threads == torch.get_num_threads()
        linears, norms = linears_of(self._module, LINEARS, dtype), norms_of(self._module, NORMS, dtype)
        if linears is None or norms is None:
            return None
        return Step(linears, norms, self._module.head_dim, self._module.scaling, dtype)

    def same(self, usual: Callable[..., Any], ours: Callable[..., Tensor | None], dtype: torch.dtype) -> bool:
        """Whether two functions give equal outputs and caches for random inputs, to the bit.

        Args:
            usual: of the module, or of the block that it is in.
            ours: in its place.
            dtype: of the numbers.
        """
        return all(self._same(usual, ours, dtype, size) for size in SIZES)

    def _same(
        self, usual: Callable[..., Any], ours: Callable[..., Tensor | None], dtype: torch.dtype, size: float
    ) -> bool:
        module, generator = self._module, torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        shared = module.k_proj.out_features // module.head_dim
        keys = random(1, shared, BEFORE, module.head_dim)
        values = random(1, shared, BEFORE, module.v_proj.out_features // shared)
        angles = random(1, 1, self.turned)
        named: dict[str, Any] = {
            "hidden_states": size * random(1, 1, module.q_proj.in_features),
            "position_embeddings": (angles.cos(), angles.sin()),
            "attention_mask": torch.tensor([True, False, True, True]).view(1, 1, 1, BEFORE + 1),
        }
        caches = DynamicCache(), DynamicCache()
        for past in caches:
            past.update(keys, values, module.layer_idx)
        expected = usual(**named, past_key_values=caches[0])
        found = ours(**named, past_key_values=caches[1])
        if not isinstance(expected, Tensor) or found is None:
            return False
        left, right = (past.layers[module.layer_idx] for past in caches)
        pairs = (expected, found), (left.keys, right.keys), (left.values, right.values)
        return all(torch.equal(*pair) for pair in pairs)


def plain(others: Mapping[str, Any]) -> bool:
    """Whether all further arguments of a module or a block can be ignored by a step."""
    return all(value is None or value is False for name, value in others.items() if name not in UNUSED)


def linears_of(module: Any, names: Sequence[str], dtype: torch.dtype) -> list[Linear] | None:
    """The arguments of kernels for a module's linears; None if one has no kernel for this dtype."""
    found = []
    for linear in (getattr(module, name) for name in names):
        own = type(linear) in (SparseLinear, DenseLinear) and "forward" not in vars(linear)
        entry = linear.entry(dtype) if own else None
        bias = linear.bias
        if entry is None or (bias is not None and not (bias.dtype == dtype and bias.is_contiguous())):
            return None
        found.append(Linear(entry, bias, (linear.out_features, linear.in_features)))
    return found


def norms_of(module: Any, names: Sequence[str], dtype: torch.dtype) -> list[Norm | None] | None:
    """The arguments of kernels for a module's norms, None for each that is missing; None if one has no kernel."""
    found = []
    for norm in (module._modules.get(name) for name in names):
        kernel = None if norm is None else kernel_of(norm)
        fits = kernel is not None and kernel.weight.dtype == dtype and kernel.weight.is_contiguous()
        if norm is not None and not fits:
            return None
        found.append(kernel)
    return found


def layer_of(past: Cache | None, index: int, step: Step) -> DynamicLayer | None:
    """The layer of a cache, if it holds one sequence, grows with each token and fits the step; else None."""
    if past is None or type(past) is not DynamicCache or past.offloading or index >= len(past.layers):
        return None
    layer: Any = past.layers[index]
    if type(layer) is not DynamicLayer or layer.get_seq_length() == 0:
        return None
    keys, values = layer.keys, layer.values
    shapes = step.shapes == (step.shapes[0], keys.shape[1::2], values.shape[1::2]) and len(keys) == 1
    dtypes = keys.dtype == values.dtype == step.dtype
    return layer if shapes and dtypes and keys.is_cpu and values.is_cpu else None


@torch.inference_mode()
def _decoder(module: Any, dtype: torch.dtype) -> Decoder | None:
    """The decoder of an attention module; None if it does something else, or there is no kernel."""
    on_cpu = all(tensor.device.type == "cpu" for tensor in module.state_dict().values())
    if not on_cpu or not serves(dtype):
        return None
    with torch.device("cpu"):  # whatever the program's default is
        for part in (1, 2, 4):
            with suppress(*UNLIKE):
                decoder = Decoder(module, module.head_dim // part)
                if decoder.same(partial(_usual, module), decoder.decoded, dtype):
                    return decoder
    return None


def _usual(module: Any, **named: Any) -> Any:
    """The output of an attention module as its family computes it, which knows no weights of attention."""
    output, weights = type(module).forward(module, **named)
    return output if weights is None else None
