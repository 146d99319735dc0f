"""Training a pruned model on: its zeros stay zero under any optimiser, in a loop of one's own and in a Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from accelerate.utils import extract_model_from_parallel  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from besa.data.arguments import checked
from besa.errors import BesaError
from besa.models.blocks import Block
from besa.models.finding import find_blocks
from besa.models.layers import biases
from besa.models.widths import widths_of
from besa.runtime.linear import SparseLinear

STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")  # of LoRA, which leave the pruned weights as they are
SHARDED = "is sharded, or lost its shape, so its zeros cannot be kept: train the model whole, or by DDP."


@checked
def keep_masks(model: nn.Module, *, adapters: bool = False) -> KeptMasks:
    """Hold the weights of a pruned model at zero that are zero now, while it is trained.

    These are the zeros of the matrices in the decoder blocks. A bias of zeros beside a matrix of zeros is held too, so
    that blocks which depth pruning took still pass their input on. Gradients of what is held are zero from now on, so
    norms, clipping, momentum and second moments are those of the sparse model. After each step of any optimiser of
    torch they are set to zero again, which weight decay, old momentum and updates that mix weights (Adafactor, Muon)
    need.

    The matrices are remembered by their modules. So the model may be moved, wrapped by peft, compiled or put into
    DistributedDataParallel before or after.

    Adapters of peft are trained as ever, and make a matrix dense when they are merged. Call `KeptMasks.apply` after the
    merge: it removes a part of what they learned, unless they were trained with `adapters`.

    Args:
        model: of transformers, pruned and dense in memory; also inside peft's PeftModel. ``model.dequantize()`` makes a
            packed one dense.
        adapters: let LoRA's adapters, which the model has already, add nothing where the weights are zero. What is
            trained is then what the merge and `apply` make. It costs a product with the whole matrix in each layer.

    Returns:
        What holds the zeros, until its `remove`, or the end of its ``with`` block.

    Raises:
        BesaError: the model has no zeros, is packed, quantised, sharded or without memory, or is no decoder of
            transformers; or it has no adapters, others than plain LoRA, or some that began by changing its weights.
    """
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    _check_start(inner)
    if hasattr(inner, "get_base_model"):  # peft
        inner = inner.get_base_model()
    name = type(inner).__name__
    if not isinstance(inner, PreTrainedModel):
        raise BesaError(f"{name} is no model of transformers: give a PreTrainedModel, also in a PeftModel.")
    if any(isinstance(module, SparseLinear) for module in inner.modules()):
        raise BesaError(
            f"The linears of {name} are packed, which cannot be trained: make them dense by `model.dequantize()` first."
        )
    if getattr(inner, "hf_quantizer", None) is not None and not widths_of(inner.config):
        raise BesaError(f"{name} is quantised, and codes cannot be trained: load the dense model that was pruned.")
    if flat := next((name for name, module in inner.named_modules() if _is_flat(module)), None):
        raise BesaError(f"{flat} {SHARDED}")
    places = list(_places(inner))
    matrices = [_held(*place) for place in places]
    if not any(matrix.zeros for matrix in matrices):
        raise BesaError(f"{name} has no zeros to keep: prune it first.")
    gone = [place for place, matrix in zip(places, matrices, strict=True) if matrix.is_zero]
    beside = [bias for bias in (_held(*each) for each in _biases(gone)) if bias.is_zero]
    return KeptMasks(matrices, beside, _adapters(inner) if adapters else {})


class KeptMasks:
    """The zeros of a model, held while it is trained; a context manager.

    Attributes:
        sparsity: share of the weights of the decoder blocks' matrices that are held at zero.

    Args:
        matrices: every one that could be pruned.
        biases: that are held too.
        adapters: layers that add to the matrices, by the module that has the weight.
    """

    def __init__(self, matrices: list[_Weight], biases: list[_Weight], adapters: dict[nn.Module, nn.Module]) -> None:
        self.sparsity = sum(matrix.zeros for matrix in matrices) / sum(matrix.numel for matrix in matrices)
        pruned = [matrix for matrix in matrices if matrix.zeros]
        self._weights = [*pruned, *biases]
        for weight in self._weights:
            weight.mask_gradient()
        self._adapters = [
            adapters[matrix.module].register_forward_hook(matrix.without_its_zeros)
            for matrix in pruned
            if matrix.module in adapters
        ]
        self._steps: RemovableHandle | None = register_optimizer_step_post_hook(self._after_step)

    def apply(self) -> None:
        """Set the weights to zero now: after a merge of adapters, or a step that no optimiser of torch made.

        It also works after `remove`.

        Raises:
            BesaError: a weight was sharded, or has another shape than it had.
        """
        for weight in self._weights:
            weight.apply()

    def check(self) -> None:
        """Check that all of them are zero.

        Raises:
            BesaError: one is not.
        """
        for weight in self._weights:
            if lost := weight.lost():
                raise BesaError(
                    f"{lost:,} zeros of {weight.name} were lost, by a merge or an optimiser that is none of torch's: "
                    "call apply() of what keep_masks returned after the merge, or after each step."
                )

    def remove(self) -> None:
        """Let the weights learn again; adapters that were trained with it are merged before."""
        if self._steps is not None:
            self._steps.remove()
            self._steps = None
            for weight in self._weights:
                weight.let_gradient()
            for hook in self._adapters:
                hook.remove()

    def __enter__(self) -> KeptMasks:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        """Set to zero what an optimiser has just changed."""
        changed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for weight in self._weights:
            if weight.is_in(changed):
                weight.apply()


class KeepMasks(TrainerCallback):  # type: ignore[misc]
    """`keep_masks` for a Trainer of transformers: ``Trainer(..., callbacks=[besa.KeepMasks()])``.

    The zeros are those that the model has when the training begins, also where it resumes from a checkpoint. When it
    ends, they are checked.

    Attributes:
        masks: what holds the zeros; None before the training. After it, `masks.apply()` restores the zeros of a model
            that adapters were merged into.
    """

    def __init__(self) -> None:
        self.masks: KeptMasks | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **about: Any
    ) -> None:
        """Hold the zeros.

        Raises:
            BesaError: as `keep_masks`, or the Trainer shards the weights.
        """
        state = AcceleratorState()
        if any(getattr(state, plugin, None) is not None for plugin in ("deepspeed_plugin", "fsdp_plugin")):
            raise BesaError(
                "Zeros cannot be kept under DeepSpeed or FSDP, which shard weights: train without them, or by DDP."
            )
        if self.masks is not None:
            self.masks.remove()  # of a training that ended by an exception
        self.masks = keep_masks(about["model"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **about: Any) -> None:
        """Check the zeros, and let go of them.

        Raises:
            BesaError: some were lost.
        """
        assert self.masks is not None
        self.masks.remove()
        self.masks.check()


class _Weight:
    """A parameter with matrices that can be pruned, or with their biases, and where it is zero.

    Attributes:
        name: of the parameter in the model.
        numel: number of its weights.
        zeros: number of these that are zero.
        module: that has the parameter, whatever takes its place there: a model that moves may get new parameters.

    Args:
        name: see above.
        module: see above.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        parameter = self._parameter
        self._mask = parameter.detach() == 0
        self.numel, self.zeros = parameter.numel(), int(self._mask.sum())
        self._hook: RemovableHandle | None = None
        self._hooked: Tensor | None = None

    @property
    def is_zero(self) -> bool:
        """Whether all of it was zero."""
        return self.zeros == self.numel

    def apply(self) -> None:
        """Set it to zero where it was.

        Raises:
            BesaError: it was sharded, or has another shape than it had.
        """
        parameter = self._checked()
        with torch.no_grad():
            parameter.masked_fill_(self._mask, 0)
        if self._hook and self._hooked is not parameter:
            self.mask_gradient()

    def lost(self) -> int:
        """How many of its zeros are none now."""
        return int((self._checked()[self._mask] != 0).sum())

    def mask_gradient(self) -> None:
        """Make the gradient zero where the parameter is, before it is added to others."""
        self.let_gradient()
        parameter = self._hooked = self._checked()
        learning = parameter.requires_grad
        parameter.requires_grad_(True)  # else torch takes no hook, which serves as soon as the parameter learns
        self._hook = parameter.register_hook(self._masked)
        parameter.requires_grad_(learning)

    def let_gradient(self) -> None:
        """Leave the gradient as it is."""
        if self._hook:
            self._hook.remove()
            self._hook = self._hooked = None

    def is_in(self, parameters: set[int]) -> bool:
        """Whether it is one of the parameters with these `id`."""
        return id(self._parameter) in parameters

    def without_its_zeros(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The output of a layer of LoRA without what its adapters add where the weight is zero."""
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        if layer.merged or layer.disable_adapters or not active:
            return output

        def lost(x: Tensor) -> Tensor:
            deltas = [layer.get_delta_weight(name) for name in active]
            at_zeros = torch.stack(deltas).sum(0).masked_fill(~self._mask.to(x.device), 0)
            transposed = isinstance(self.module, Conv1D)
            return x.to(at_zeros.dtype) @ (at_zeros if transposed else at_zeros.T)

        added: Tensor = checkpoint(lost, inputs[0], use_reentrant=False)  # else the matrix waits for the backward pass
        return output - added.to(output.dtype)

    @property
    def _parameter(self) -> Tensor:
        parameter: Tensor = getattr(self.module, self.name.rpartition(".")[2])
        return parameter

    def _masked(self, gradient: Tensor) -> Tensor:
        self._mask = self._mask.to(gradient.device)
        return gradient.masked_fill(self._mask, 0)

    def _checked(self) -> Tensor:
        """The parameter, with the mask on its device."""
        parameter = self._parameter
        if isinstance(parameter, DTensor) or parameter.shape != self._mask.shape:
            raise BesaError(f"{self.name} {SHARDED}")
        self._mask = self._mask.to(parameter.device)
        return parameter


def _places(model: PreTrainedModel) -> Iterator[tuple[Block, str]]:
    """The parameters that the prunable matrices of a model lie in, but not those of adapters: block and name within.

    Raises:
        BesaError: besa cannot find them.
    """
    for block in find_blocks(model):
        adapted = [path for path, module in block.module.named_modules() if hasattr(module, "base_layer")]
        for place in dict.fromkeys(prunable.parameter for prunable in block.prunables.values()):
            inside = [path for path in adapted if place.startswith(f"{path}.")]
            if all(place.startswith(f"{path}.base_layer.") for path in inside):
                yield block, place


def _biases(places: list[tuple[Block, str]]) -> Iterator[tuple[Block, str]]:
    """The biases of matrices; both as from `_places`."""
    for block, place in places:
        names = [name for name, prunable in block.prunables.items() if prunable.parameter == place]
        yield from ((block, bias) for bias in biases(block, names))


def _held(block: Block, place: str) -> _Weight:
    """A parameter of a block, with its zeros.

    Raises:
        BesaError: it has no memory, is sharded or holds codes.
    """
    name, parameter = f"{block.name}.{place}", block.module.get_parameter(place)
    if parameter.is_meta:
        raise BesaError(f"{name} has no memory (meta device): load the weights first.")
    if isinstance(parameter, DTensor):
        raise BesaError(f"{name} {SHARDED}")
    if not parameter.is_floating_point():
        raise BesaError(f"{name} holds codes, which cannot be trained: load the dense model that was pruned.")
    return _Weight(name, block.module.get_submodule(place.rpartition(".")[0]))


def _adapters(model: PreTrainedModel) -> dict[nn.Module, nn.Module]:
    """The layers of LoRA in a model, by the module that each adds to.

    Raises:
        BesaError: there are none, or one is no plain LoRA or has dropout.
    """
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}
    if not layers:
        raise BesaError("The model has no adapters yet: call keep_masks with adapters after peft.get_peft_model.")
    for name, layer in layers.items():
        if not hasattr(layer, "lora_A") or layer.lora_variant or not isinstance(layer.base_layer, nn.Linear | Conv1D):
            raise BesaError(f"{name} is no plain LoRA of a linear: only such adapters can be kept sparse.")
        if any(getattr(one, "p", 0) for one in layer.lora_dropout.values()):
            raise BesaError(
                f"{name} has dropout, by which its adapter would add to weights that are zero: set lora_dropout=0."
            )
    return {layer.base_layer: layer for layer in layers.values()}


def _check_start(model: nn.Module) -> None:
    """Refuse adapters that began by changing the weights that they add to.

    Raises:
        BesaError: one did, so that the zeros are gone.
    """
    for adapter in (getattr(model, "peft_config", None) or {}).values():
        start = getattr(adapter, "init_lora_weights", True)
        if start not in STARTS:
            raise BesaError(
                f"The adapters began with init_lora_weights={start!r}, which changes the pruned weights too: take True "
                "or 'gaussian'."
            )


def _is_flat(module: nn.Module) -> bool:
    """Whether a module's matrix is a part of one, or none, as DeepSpeed and FSDP leave it."""
    return isinstance(module, nn.Linear | Conv1D) and module.weight.dim() != 2
