"""Attention modules of packed models: while one sequence is decoded, each is one call of besa's kernel.

Families write attention in several ways. What a module computes is found by trying it. It keeps its class and its
parts; only its `forward` differs, and computes what it always did where the kernel cannot.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from besa.kernels import attention
from besa.kernels.decoding import Linear, Step, serves
from besa.runtime.growing import grow
from besa.runtime.linear import SparseLinear
from besa.runtime.norms import kernel_of
from besa.runtime.tracing import tracing

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
UNUSED = {"position_ids", "use_cache", "cache_position"}  # arguments that change nothing in such a module
BEFORE = 3  # tokens in the cache by which a module is tried
UNLIKE = (TypeError, ValueError, RuntimeError, AttributeError, LookupError)  # what another kind of module may raise


def speed_up(model: PreTrainedModel) -> None:
    """Let the attention modules of a model decode by besa's kernel where it computes the same."""
    for module in model.modules():
        if "forward" not in vars(module) and all(hasattr(module, name) for name in (*LINEARS, "layer_idx", "scaling")):
            turned = _turned(module, model.dtype)
            if turned is not None:
                module.forward = _Decoder(module, turned)


def restore(model: nn.Module) -> None:
    """Undo `speed_up`."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), _Decoder):
            del module.forward


class _Decoder:
    """The `forward` of an attention module that has been tried.

    Args:
        module: the attention module.
        turned: numbers of a head that the rotary embedding turns.
    """

    def __init__(self, module: Any, turned: int) -> None:
        self._module, self._turned = module, turned
        self._step: Step | None = None
        self._of: list[object] = []  # what the step is made of

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """What the family's own `forward` gives."""
        if not inputs and (found := self.decoded(**named)) is not None:
            return found, None
        return type(self._module).forward(self._module, *inputs, **named)

    def decoded(
        self,
        hidden_states: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **others: Any,
    ) -> Tensor | None:
        """The module's output for one more token; None, with nothing changed, if this is no such call.

        Args:
            hidden_states: as the family's own `forward` takes it, as are all others.
            position_embeddings: see there.
            attention_mask: see there.
            past_key_values: see there.
            others: see there.
        """
        module = self._module
        if (
            torch.is_grad_enabled()
            or hidden_states is None
            or position_embeddings is None
            or hidden_states.shape[:2] != (1, 1)
            or module.training
            or tracing()
            or torch.is_autocast_enabled("cpu")
            or module.config._attn_implementation != "sdpa"
            or any(value for name, value in others.items() if name not in UNUSED)
        ):
            return None
        layer = _layer(past_key_values, module.layer_idx)
        if layer is None or len(layer.keys) != 1:
            return None
        if attention_mask is not None and not attention.allows(attention_mask, 1, layer.keys.size(2) + 1):
            return None
        if not all(each.shape == (1, 1, self._turned) for each in position_embeddings):
            return None
        dtype = hidden_states.dtype
        tensors = (hidden_states, layer.keys, layer.values, *position_embeddings)
        if not all(tensor.is_cpu and tensor.dtype == dtype for tensor in tensors):
            return None
        step = self._ready(dtype)
        if step is None or step.shapes != (hidden_states.shape, layer.keys.shape[1::2], layer.values.shape[1::2]):
            return None
        cosines, sines = (each.contiguous() for each in position_embeddings)
        return step(hidden_states.contiguous(), (cosines, sines), *grow(layer), attention_mask)

    def _ready(self, dtype: torch.dtype) -> Step | None:
        """The step for the module as it is now; None if a part has no kernel, or something hangs on it."""
        parts = self._module._modules
        linears = [parts[name] for name in LINEARS]
        norms = [parts.get(name) for name in NORMS]
        if not all(type(linear) is SparseLinear for linear in linears):
            return None
        if any(part._forward_hooks or part._forward_pre_hooks for part in (*linears, *norms) if part is not None):
            return None
        tensors = [*(linear.bias for linear in linears), *(getattr(norm, "weight", None) for norm in norms)]
        places = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        forwards = [vars(norm).get("forward") for norm in norms if norm is not None]
        products = [linear.product for linear in linears]
        made_of = [dtype, torch.get_num_threads(), *places, *forwards, *products]
        if made_of != self._of:
            self._step, self._of = _step(self._module, dtype), made_of
        return self._step

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without what holds addresses in memory."""
        return {**self.__dict__, "_step": None, "_of": []}


def _step(module: Any, dtype: torch.dtype) -> Step | None:
    """A step of a module; None if a linear or a norm has no kernel for this dtype."""
    linears, norms = [], []
    for linear in (getattr(module, name) for name in LINEARS):
        entry = linear.product.entry(dtype)
        if entry is None or (linear.bias is not None and linear.bias.dtype != dtype):
            return None
        linears.append(Linear(entry, linear.bias, (linear.out_features, linear.in_features)))
    for norm in (getattr(module, name, None) for name in NORMS):
        kernel = None if norm is None else kernel_of(norm)
        if norm is not None and (kernel is None or kernel.weight.dtype != dtype):
            return None
        norms.append(kernel)
    return Step(linears, norms, module.head_dim, module.scaling, dtype)


def _layer(past: Cache | None, index: int) -> DynamicLayer | None:
    """The layer of a cache, if it has tokens and grows with each."""
    if past is None or type(past) is not DynamicCache or past.offloading or index >= len(past.layers):
        return None
    layer: Any = past.layers[index]
    return layer if type(layer) is DynamicLayer and layer.get_seq_length() > 0 else None


@torch.inference_mode()
def _turned(module: Any, dtype: torch.dtype) -> int | None:
    """How many numbers of a head are turned; None if a module does something else, or there is no kernel."""
    on_cpu = all(tensor.device.type == "cpu" for tensor in module.state_dict().values())
    if not on_cpu or not serves(dtype):
        return None
    with torch.device("cpu"):  # whatever the program's default is
        for part in (1, 2, 4):
            with suppress(*UNLIKE):
                turned: int = module.head_dim // part
                if _same(module, turned, dtype):
                    return turned
    return None


def _same(module: Any, turned: int, dtype: torch.dtype) -> bool:
    """Whether a module computes the same numbers as a decoder of random ones, and caches the same."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    shared = module.k_proj.out_features // module.head_dim
    keys = random(1, shared, BEFORE, module.head_dim)
    values = random(1, shared, BEFORE, module.v_proj.out_features // shared)
    angles = random(1, 1, turned)
    named: dict[str, Any] = {
        "hidden_states": random(1, 1, module.q_proj.in_features),
        "position_embeddings": (angles.cos(), angles.sin()),
        "attention_mask": torch.tensor([True, False, True, True]).view(1, 1, 1, BEFORE + 1),
    }
    usual, ours = DynamicCache(), DynamicCache()
    for past in (usual, ours):
        past.update(keys, values, module.layer_idx)
    expected, weights = type(module).forward(module, **named, past_key_values=usual)
    found = _Decoder(module, turned).decoded(**named, past_key_values=ours)
    if found is None or weights is not None:
        return False
    left, right = usual.layers[module.layer_idx], ours.layers[module.layer_idx]
    pairs = (expected, found), (left.keys, right.keys), (left.values, right.values)
    return all(torch.equal(*pair) for pair in pairs)
