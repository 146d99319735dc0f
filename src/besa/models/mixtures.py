"""The mixtures of experts of a decoder: where they are, and the same model with fewer experts in each."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from besa.errors import BesaError
from besa.models.blocks import Block
from besa.models.experts import find_experts, stacks
from besa.models.finding import find_blocks
from besa.models.layout import FURTHER
from besa.models.loading import skeleton_like

# What families call these numbers in their configurations.
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
GROUPS, CHOSEN_GROUPS = ("n_group", "num_expert_group"), "topk_group"


@dataclass(frozen=True)
class Mixture:
    """The experts that one router chooses from.

    Attributes:
        name: path in the model of the module that has router and experts, such as ``model.layers.3.mlp``.
        block: position of its block in the decoder.
        holders: paths in the model of the modules that hold the experts, in module order.
        experts: number of experts.
    """

    name: str
    block: int
    holders: tuple[str, ...]
    experts: int


@dataclass(frozen=True)
class Mixtures:
    """All mixtures of a decoder, which have the same number of experts.

    Attributes:
        each: in module order.
        experts: number of experts of each.
        groups: of consecutive experts, among which a token first chooses some; 1 without groups.
        least: number of experts that a token must have to choose from.
    """

    each: tuple[Mixture, ...]
    experts: int
    groups: int
    least: int


def find_mixtures(model: PreTrainedModel, blocks: Sequence[Block]) -> Mixtures:
    """The mixtures of a decoder.

    Raises:
        BesaError: it has none, they have different numbers of experts, experts are modules of their own, or the
            configuration does not say how many a token gets.
    """
    each = tuple(mixture for block in blocks for mixture in _of_block(block))
    if not each:
        raise BesaError(
            f"{type(model).__name__} has no experts that a router chooses from: leave out experts.method, or prune a "
            "mixture of experts."
        )
    if len(numbers := {mixture.experts for mixture in each}) > 1:
        raise BesaError(
            f"The blocks of {type(model).__name__} have from {min(numbers)} to {max(numbers)} experts, and besa drops "
            "the same number from all: leave out experts.method."
        )
    config = model.config.get_text_config()
    if (chosen := chosen_experts(config)) is None:
        raise BesaError(
            f"The configuration of {type(model).__name__} does not say how many experts a token gets, under any key "
            f"that besa knows ({', '.join(CHOSEN)}), so besa cannot tell how many must stay: leave out experts.method."
        )
    groups = next((int(getattr(config, key)) for key in GROUPS if getattr(config, key, None)), 0)
    # A group is judged by its best two experts.
    of_group = max(2, -(-chosen // max(1, int(getattr(config, CHOSEN_GROUPS, None) or 1)))) if groups else chosen
    return Mixtures(each, each[0].experts, max(1, groups), max(1, groups) * of_group)


def chosen_experts(config: PreTrainedConfig) -> int | None:
    """How many experts a token gets, by the text decoder's configuration; the most if blocks differ, None if unsaid."""
    said = next((getattr(config, key) for key in CHOSEN if getattr(config, key, None)), None)
    if said is None:
        return None
    return max(map(int, said)) if isinstance(said, list | tuple) else int(said)


def _of_block(block: Block) -> Iterator[Mixture]:
    by_owner: dict[str, list[str]] = {}
    modules = dict(block.module.named_modules())
    found = find_experts(block.module)
    for path in modules:
        if path in found.holders:
            by_owner.setdefault(path.rpartition(".")[0], []).append(path)
    for owner, holders in by_owner.items():
        first = stacks(modules[holders[0]])
        if not first:
            raise BesaError(
                f"{block.name}.{holders[0]} is a list of modules, whose gates besa cannot see: leave out "
                "experts.method."
            )
        paths = tuple(f"{block.name}.{path}" for path in holders)
        yield Mixture(f"{block.name}.{owner}".rstrip("."), block.index, paths, next(iter(first.values())).shape[0])


@dataclass(frozen=True)
class Fewer:
    """A decoder with fewer experts, as its configuration describes it.

    Attributes:
        whole: blocks of the decoder with all experts.
        mixtures: of this decoder.
        kept: number of experts of each mixture that stay.
        model: of the smaller shapes, on the meta device.
        blocks: of this model.
        settings: keys of the text decoder's configuration with their new values.
        axes: along which axis a tensor of the model is smaller, by name.
        dropped: number of parameters that go.
    """

    whole: list[Block]
    mixtures: Mixtures
    kept: int
    model: PreTrainedModel
    blocks: list[Block]
    settings: dict[str, int]
    axes: dict[str, int]
    dropped: int

    def of(self, name: str) -> str:
        """The name of the mixture that a tensor or module belongs to."""
        return next(each.name for each in self.mixtures.each if name.startswith(f"{each.name}."))


def fewer(model: PreTrainedModel, blocks: list[Block], mixtures: Mixtures, kept: int) -> Fewer:
    """The shapes of a decoder with `kept` experts in each mixture.

    Args:
        model: with all experts; its weights may be on the meta device.
        blocks: of the model.
        mixtures: of the model.
        kept: number of experts that stay.

    Raises:
        BesaError: no key of the configuration is the number of experts, so that it cannot describe fewer.
    """
    said = model.config.get_text_config().to_dict()
    further = {key: 0 for key in FURTHER if said.get(key)}
    for key in [key for key, value in said.items() if "expert" in key and value == mixtures.experts]:
        settings = {key: kept} | further
        try:
            smaller = skeleton_like(model, changed(model.config, settings))
        except BesaError:  # the key is another number, or the family checks it against others
            continue
        axes = _smaller_axes(model, smaller, mixtures, kept)
        if axes is not None:
            dropped = sum(
                parameter.numel() - smaller.get_parameter(name).numel()
                for name, parameter in model.named_parameters()
                if name in axes
            )
            return Fewer(blocks, mixtures, kept, smaller, find_blocks(smaller), settings, axes, dropped)
    raise BesaError(
        f"{type(model).__name__} has a configuration that cannot describe {kept} in place of {mixtures.experts} "
        "experts: leave out experts.method."
    )


def changed(config: PreTrainedConfig, settings: Mapping[str, int]) -> PreTrainedConfig:
    """A copy of a configuration with other values for keys of its text decoder."""
    other = copy.deepcopy(config)
    for key, value in settings.items():
        setattr(other.get_text_config(), key, value)
    return other


def _smaller_axes(
    model: PreTrainedModel, smaller: PreTrainedModel, mixtures: Mixtures, kept: int
) -> dict[str, int] | None:
    """Along which axis each smaller tensor is smaller; None if shapes differ by anything but the number of experts."""
    before, after = _shapes(model), _shapes(smaller)
    inside = tuple(f"{each.name}." for each in mixtures.each)
    if before.keys() != after.keys():
        return None
    axes = {}
    for name, old in before.items():
        new = after[name]
        if new == old:
            continue
        differing = [axis for axis, sizes in enumerate(zip(old, new, strict=False)) if sizes[0] != sizes[1]]
        if len(old) != len(new) or len(differing) != 1 or not name.startswith(inside):
            return None
        axis = axes[name] = differing[0]
        if (old[axis], new[axis]) != (mixtures.experts, kept):
            return None
    return axes or None


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.shape for name, tensor in tensors}
