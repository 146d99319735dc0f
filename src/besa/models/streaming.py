"""A decoder whose weights are there one block at a time: from a checkpoint on disk, or from a model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from besa.models.blocks import Block, find_blocks
from besa.models.layout import Layout, in_files, load_tensors, tie
from besa.models.loading import Source, read_config, read_generation_config, refuse_quantized, skeleton
from besa.storage.formats.container import open_files


class Decoder(Protocol):
    """What the block loop needs of a model, wherever its weights are.

    Attributes:
        model: its modules.
        blocks: of the model.
        folder: of the checkpoint that is read, None for a model in memory.
        dtype: name of the dtype that was asked for in place of the checkpoint's, None where that stays.
        unbuilt: names of stored tensors that the model has no place for; `tensors_outside_blocks` yields them.
        unbuilt_bytes: what these take.
    """

    model: PreTrainedModel
    blocks: list[Block]
    folder: Path | None
    dtype: str | None
    unbuilt: list[str]
    unbuilt_bytes: int

    def embeddings(self) -> AbstractContextManager[None]:
        """While open, what the inner model has outside its blocks has its weights."""

    def outside_blocks(self) -> AbstractContextManager[None]:
        """While open, all that comes before the first block and after the last has its weights, the head too."""

    def opened(self, block: Block, device: torch.device) -> AbstractContextManager[None]:
        """While open, the block has its weights on `device`."""

    def prefetch(self, block: Block) -> None:
        """Get ready for opening the block soon."""

    def stored(self, block: Block) -> dict[str, Tensor]:
        """The tensors of an open block, named and laid out as in the checkpoint's files."""

    def name_in_files(self, name: str) -> str:
        """What the checkpoint's files call the linear that the model calls `name`."""

    def load_tensors(self, block: Block, tensors: Mapping[str, Tensor]) -> None:
        """Give an open block tensors that `stored` took from it."""

    def tensors_outside_blocks(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that belong to no block, one by one, named as in the checkpoint's files."""


class DecoderInMemory:
    """A model that is loaded whole; what is done to its blocks stays."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.blocks = find_blocks(model)
        self.folder: Path | None = None
        self.dtype: str | None = None
        self.unbuilt: list[str] = []
        self.unbuilt_bytes = 0

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        """Nothing to do: they are there."""
        yield

    def outside_blocks(self) -> AbstractContextManager[None]:
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

    def prefetch(self, block: Block) -> None:
        """Nothing to do: it is there."""

    def stored(self, block: Block) -> dict[str, Tensor]:
        """See `Decoder`."""
        return in_files(self.model, block)

    def name_in_files(self, name: str) -> str:
        """See `Decoder`."""
        return name

    def load_tensors(self, block: Block, tensors: Mapping[str, Tensor]) -> None:
        """See `Decoder`."""
        device = next(block.module.parameters()).device
        load_tensors(self.model, tensors, get_model_conversion_mapping(self.model), self.model.name_or_path)
        block.module.to(device)

    def tensors_outside_blocks(self) -> Iterator[tuple[str, Tensor]]:
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

    Raises:
        BesaError: configuration or weight files are damaged, or of no decoder that besa can prune.
    """

    def __init__(self, source: Source, dtype: str = "auto") -> None:
        assert source.folder is not None
        self.folder: Path | None = source.folder
        self.dtype = None if dtype == "auto" else dtype
        self._files = open_files(source.folder)
        config = read_config(source)
        refuse_quantized(source, config)
        config.dtype = getattr(torch, dtype) if self.dtype else config.dtype or self._files.dtype()
        with torch.device("meta"):  # wrong sizes are found out before anything of that size is made
            empty = skeleton(source, config)
        self._layout = Layout(source.name, self._files, empty, find_blocks(empty))
        self.model = skeleton(source, config)
        self.model.generation_config = read_generation_config(source, self.model)
        self.blocks = find_blocks(self.model)
        self.unbuilt, self.unbuilt_bytes = self._layout.unbuilt, self._layout.unbuilt_bytes

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        """Read what the inner model has outside its blocks, and forget it afterwards."""
        with self._read_outside_blocks(self._layout.embeddings):
            yield

    @contextmanager
    def outside_blocks(self) -> Iterator[None]:
        """Read what the model has outside its blocks, and forget it afterwards."""
        with self._read_outside_blocks([*self._layout.embeddings, *self._layout.head]):
            yield

    @contextmanager
    def _read_outside_blocks(self, names: list[str]) -> Iterator[None]:
        within = {module for block in self.blocks for module in block.module.modules()}
        try:
            self._layout.read(self.model, names)
            tie(self.model)
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
            self._layout.read(self.model, self._layout.of_block[block.name])
            block.module.to(device)
            yield
        finally:
            for module in modules:
                _forget(module)

    def prefetch(self, block: Block) -> None:
        """See `Decoder`: the block is read while another is computed."""
        self._files.prefetch(self._layout.of_block[block.name])

    def check_writable(self) -> None:
        """Find out before the work whether blocks can be written as the files have them.

        Raises:
            BesaError: they cannot.
        """
        self._layout.check_way_back()

    def stored(self, block: Block) -> dict[str, Tensor]:
        """See `Decoder`; unless another dtype was asked for, numbers that did not change keep dtype and bits."""
        return self._layout.stored(block, rounded=self.dtype is not None)

    def name_in_files(self, name: str) -> str:
        """See `Decoder`."""
        return self._layout.name_in_files(name)

    def load_tensors(self, block: Block, tensors: Mapping[str, Tensor]) -> None:
        """See `Decoder`."""
        device = next(block.module.parameters()).device
        self._layout.load_tensors(self.model, tensors)
        block.module.to(device)

    def tensors_outside_blocks(self) -> Iterator[tuple[str, Tensor]]:
        """See `Decoder`; also what the model has no place for."""
        yield from self._layout.tensors_outside_blocks(rounded=self.dtype is not None)


def _forget(module: nn.Module) -> None:
    """Parameters of the module itself back to the meta device; buffers stay."""
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
