"""A decoder whose weights are there one block at a time: from a checkpoint on disk, or from a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import NoReturn, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig, remove_tied_weights_from_state_dict

from besa.checkpoint.formats.container import open_files
from besa.errors import BesaError
from besa.models.blocks import Block, find_blocks
from besa.models.loading import (
    Source,
    is_quantized,
    model_explained,
    quiet,
    read_config,
    read_generation_config,
    skeleton,
)

HEAD = "head"


class Decoder(Protocol):
    """What the block loop needs of a model, wherever its weights are."""

    model: PreTrainedModel
    blocks: list[Block]

    def embeddings(self) -> AbstractContextManager[None]:
        """While open, what the inner model has outside its blocks has its weights."""

    def ends(self) -> AbstractContextManager[None]:
        """While open, all that comes before the first block and after the last has its weights, the head too."""

    def opened(self, block: Block, device: torch.device) -> AbstractContextManager[None]:
        """While open, the block has its weights on `device`."""

    def expect(self, block: Block) -> None:
        """Get ready for opening the block soon."""

    def stored(self, block: Block) -> dict[str, Tensor]:
        """The tensors of an open block, named and laid out as in the checkpoint's files."""

    def fill(self, block: Block, tensors: Mapping[str, Tensor]) -> None:
        """Give an open block tensors that `stored` took from it."""

    def rest(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that belong to no block, one by one, named as in the checkpoint's files."""


class DecoderInMemory:
    """A model that is loaded whole; what is done to its blocks stays."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.blocks = find_blocks(model)

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        """Nothing to do: they are there."""
        yield

    def ends(self) -> AbstractContextManager[None]:
        """Nothing to do either."""
        return self.embeddings()

    @contextmanager
    def opened(self, block: Block, device: torch.device) -> Iterator[None]:
        """Move the block to `device` and back."""
        home, experts = self.model.device, self.model.get_experts_implementation()
        if self.model._can_set_experts_implementation():
            self.model.set_experts_implementation("eager")  # grouped products cannot be watched
        block.module.to(device)
        try:
            yield
        finally:
            block.module.to(home)
            if self.model._can_set_experts_implementation():
                self.model.set_experts_implementation(experts)

    def expect(self, block: Block) -> None:
        """Nothing to do: it is there."""

    def stored(self, block: Block) -> dict[str, Tensor]:
        """See `Decoder`."""
        return _stored(self.model, block)

    def fill(self, block: Block, tensors: Mapping[str, Tensor]) -> None:
        """See `Decoder`."""
        device = next(block.module.parameters()).device
        fill(self.model, tensors, get_model_conversion_mapping(self.model), self.model.name_or_path)
        block.module.to(device)

    def rest(self) -> Iterator[tuple[str, Tensor]]:
        """See `Decoder`; of tied tensors comes the one that loading expects."""
        inside = tuple(f"{block.name}." for block in self.blocks)
        state = remove_tied_weights_from_state_dict(dict(self.model.state_dict()), self.model)
        outside = {name: tensor for name, tensor in state.items() if not name.startswith(inside)}
        yield from revert_weight_conversion(self.model, outside).items()


class DecoderOnDisk:
    """A folder of safetensors, of which the embeddings or one block at a time are in memory.

    The modules stand on the meta device, their buffers (rotary frequencies, masks) are real. transformers' own
    conversion turns names and layouts of the files into those of the modules, and back.

    Args:
        source: a local folder.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        BesaError: configuration or weight files are damaged, or of no decoder that besa can prune.
    """

    def __init__(self, source: Source, dtype: str = "auto", trust_remote_code: bool = False) -> None:
        assert source.folder is not None
        self._source = source
        self._files = open_files(source.folder)
        config = read_config(source, trust_remote_code)
        if is_quantized(config):
            raise BesaError(f"{source.name} is quantised: prune the model it was made from.")
        if dtype == "auto":
            config.dtype = config.dtype or self._files.dtype()
        else:
            config.dtype = getattr(torch, dtype)
        depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if depth > len(self._files.names):
            raise BesaError(
                f"The config.json of {source.name} says {depth:,} blocks, its files hold {len(self._files.names):,} "
                "tensors: it is damaged, or belongs to another checkpoint."
            )
        with torch.device("meta"):  # wrong sizes are found out before anything of that size is made
            self._check(skeleton(source, config, trust_remote_code))
        self.model = skeleton(source, config, trust_remote_code)
        self.model.generation_config = read_generation_config(source, self.model)
        self.blocks = find_blocks(self.model)
        self._conversions = get_model_conversion_mapping(self.model)
        self._names = self._names_by_block()

    def _check(self, empty: PreTrainedModel) -> None:
        """Find out before the work, from the headers alone, whether a weight is missing or of the wrong shape.

        Raises:
            BesaError: so it is.
        """
        state = empty.state_dict()
        renamed = renaming(empty, get_model_conversion_mapping(empty))
        filled = set()
        for stored, shape in self._files.shapes():
            name, merged = renamed(stored)
            filled.add(name)
            if name in state and not merged and shape != tuple(state[name].shape):
                _refuse_shape(self._source.name, name, shape, state[name].shape)
        tied = empty.all_tied_weights_keys
        for name, _ in empty.named_parameters(remove_duplicate=False):
            if not {name, tied.get(name, name)} & filled:
                raise BesaError(f"{self._source.name} lacks the weight {name}: the checkpoint is incomplete.")

    def _names_by_block(self) -> dict[str, list[str]]:
        """Names in the files by the block they belong to; under "" what else the inner model has, under HEAD the rest.

        What the model has no place for is left out.
        """
        state = self.model.state_dict()
        renamed = renaming(self.model, self._conversions)
        names: dict[str, list[str]] = {name: [] for name in ("", HEAD, *(block.name for block in self.blocks))}
        inner = {id(parameter) for parameter in self.model.base_model.parameters()}
        head = {name for name, parameter in self.model.named_parameters() if id(parameter) not in inner}
        for stored in self._files.names:
            name, merged = renamed(stored)
            if name in state or merged:
                owner = next((part for part in _prefixes(name) if part in names), HEAD if name in head else "")
                names[owner].append(stored)
        return names

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        """Read what the inner model has outside its blocks, and forget it afterwards."""
        with self._outside([""]):
            yield

    @contextmanager
    def ends(self) -> Iterator[None]:
        """Read what the model has outside its blocks, and forget it afterwards."""
        with self._outside(["", HEAD]):
            self.model.tie_weights()  # a head that is the embeddings is not in the files
            yield

    @contextmanager
    def _outside(self, owners: list[str]) -> Iterator[None]:
        within = {module for block in self.blocks for module in block.module.modules()}
        try:
            for owner in owners:
                self._read(owner)
            yield
        finally:
            for module in self.model.modules():
                if module not in within:
                    _forget(module)

    @contextmanager
    def opened(self, block: Block, device: torch.device) -> Iterator[None]:
        """Read the block, and forget it afterwards."""
        modules = list(block.module.modules())
        try:
            self._read(block.name)
            block.module.to(device)
            yield
        finally:
            for module in modules:
                _forget(module)

    def expect(self, block: Block) -> None:
        """See `Decoder`: the block is read while another is computed."""
        self._files.expect(self._names[block.name])

    def _read(self, owner: str) -> None:
        """Fill modules from the files.

        Raises:
            BesaError: a tensor is damaged, or not finite.
        """
        fill(self.model, dict(self._files.read(self._names[owner])), self._conversions, self._source.name)

    def stored(self, block: Block) -> dict[str, Tensor]:
        """See `Decoder`."""
        prefix = f"{self.model.base_model_prefix}."
        bare = not any(name.startswith(prefix) for name in self._files.names)  # GPT-2's files lack "transformer."
        tensors = _stored(self.model, block)
        return {name.removeprefix(prefix) if bare else name: tensor for name, tensor in tensors.items()}

    def fill(self, block: Block, tensors: Mapping[str, Tensor]) -> None:
        """See `Decoder`."""
        device = next(block.module.parameters()).device
        fill(self.model, tensors, self._conversions, self._source.name)
        block.module.to(device)

    def rest(self) -> Iterator[tuple[str, Tensor]]:
        """See `Decoder`."""
        for name, tensor in self._files.read([*self._names[""], *self._names[HEAD]]):
            yield name, tensor.to(self.model.dtype) if tensor.is_floating_point() else tensor


def renaming(model: PreTrainedModel, conversions: list[WeightTransform]) -> Callable[[str], tuple[str, bool]]:
    """A function from a name in the files to that in the model, and whether the tensor is merged with others there."""
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state = model.state_dict()

    def renamed(stored: str) -> tuple[str, bool]:
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        return name, pattern is not None

    return renamed


def _refuse_shape(source: str, name: str, found: Iterable[int], expected: Iterable[int]) -> NoReturn:
    raise BesaError(
        f"{source}: the weight {name} is {tuple(found)}, its config.json says {tuple(expected)}: "
        "it is damaged, or belongs to another checkpoint."
    )


def _prefixes(name: str) -> Iterator[str]:
    """a, a.b, … of a.b.c."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))


def _stored(model: PreTrainedModel, block: Block) -> dict[str, Tensor]:
    state = {f"{block.name}.{name}": tensor for name, tensor in block.module.state_dict().items()}
    tensors: dict[str, Tensor] = revert_weight_conversion(model, state)
    return tensors


def fill(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], conversions: list[WeightTransform], source: str
) -> None:
    """Load tensors under their names in the files into the model's parameters, in the dtype of the model."""
    config = LoadStateDictConfig(
        dtype=model.dtype, dtype_plan=model._get_dtype_plan(model.dtype), weight_mapping=conversions
    )
    with quiet(), model_explained(source):
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
    for name, found, expected in info.mismatched_keys:
        _refuse_shape(source, name, found, expected)
    for name, reason in info.conversion_errors.items():
        raise BesaError(f"{source}: the weight {name} cannot be read: {' '.join(reason.split())[:200]}.")
    model.requires_grad_(False)


def _forget(module: nn.Module) -> None:
    """Parameters of the module itself back to the meta device; buffers stay."""
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
