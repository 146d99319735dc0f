"""The decoder blocks of a model, found in its module tree, and what of them stays dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from torch import nn
from transformers import PreTrainedModel

from besa.errors import BesaError
from besa.models.blocks import Block
from besa.models.prunable import Prunable, everywhere, find_prunables
from besa.storage.formats.container import DEPTHS


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """The decoder blocks of a causal language model, from its module tree.

    The decoder is the list of modules that is as long as the model is deep and has the most prunable weights. If the
    model has several towers, only the one that reads text counts.

    Raises:
        BesaError: no list of decoder blocks is found, a block has no matrix to prune, a matrix is computed from other
            parameters, or blocks share weights.
    """
    config = model.config.get_text_config()
    depths = [getattr(config, name) for name in DEPTHS if hasattr(config, name)]
    stacks = _stacks(model, _text_tower(model), depths) or _stacks(model, model, depths)
    if not stacks:
        raise BesaError(
            f"{type(model).__name__} has no stack of decoder blocks that besa can find: use a causal decoder."
        )
    path, largest = max(stacks.items(), key=lambda item: sum(each.numel for part in item[1] for each in part.values()))
    blocks = []
    for index, (module, inner) in enumerate(zip(model.get_submodule(path), largest, strict=True)):
        name = f"{path}.{index}"
        if not inner:
            raise BesaError(f"{name} of {type(model).__name__} has no linear weights to prune.")
        parameters = {parameter for parameter, _ in module.named_parameters(remove_duplicate=False)}
        if computed := [place for place, prunable in inner.items() if prunable.parameter not in parameters]:
            raise BesaError(
                f"The weight of {name}.{computed[0]} is computed from other parameters: remove its parametrization "
                "(torch.nn.utils), so that the weight itself is a parameter."
            )
        prunables = {f"{name}.{place}": prunable for place, prunable in inner.items()}
        blocks.append(Block(index, name, module, prunables))
    _refuse_shared_weights(model, blocks)
    return blocks


def _text_tower(model: PreTrainedModel) -> nn.Module:
    """The part of a model that reads text, often the model itself."""
    tower: nn.Module = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    return tower


def _stacks(model: nn.Module, tower: nn.Module, depths: list[int]) -> dict[str, list[dict[str, Prunable]]]:
    """The prunable matrices of each module, for every list with as many modules as the model is deep, by its path."""
    inside = set(tower.modules())
    return {
        path: [find_prunables(part) for part in module]
        for path, module in model.named_modules()
        if module in inside and isinstance(module, nn.ModuleList) and 0 < len(module) in depths
    }


def _refuse_shared_weights(model: PreTrainedModel, blocks: list[Block]) -> None:
    """Refuse a weight that belongs to two blocks or places: blocks are pruned one after another.

    Raises:
        BesaError: there is such a weight.
    """
    places: dict[int, str] = {}
    for block in blocks:
        for inner, parameter in block.module.named_parameters(remove_duplicate=False):
            name, memory = f"{block.name}.{inner}", 0 if parameter.is_meta else parameter.data_ptr()
            if (other := places.setdefault(memory or id(parameter), name)) != name:
                raise BesaError(
                    f"{type(model).__name__} cannot be pruned block by block: {other} and {name} are one weight."
                )


def left_dense(blocks: Iterable[Block], pruned: Collection[str]) -> dict[str, int]:
    """Number of weights in matrices that are not pruned, such as routers, convolutions and skipped linears.

    Args:
        blocks: of a decoder.
        pruned: full names of the pruned matrices.

    Returns:
        Sums over blocks by name within the block, with ``*`` for numbers. Norms and biases do not count.
    """
    dense: Counter[str] = Counter()
    for block in blocks:
        in_pruned: Counter[str] = Counter()
        for name, prunable in block.prunables.items():
            in_pruned[prunable.parameter] += prunable.numel if name in pruned else 0
        for name, parameter in block.module.named_parameters():
            weights = parameter.numel() - in_pruned[name]
            if weights and parameter.dim() > 1 and not name.endswith("bias"):
                dense[everywhere(name.removesuffix(".weight"))] += weights
    return dict(dense)
