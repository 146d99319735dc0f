"""A decoder of which one block at a time has its weights: from a checkpoint on disk, or from a model in memory."""

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
    """A model as the block loop uses it, wherever its weights are.

    Attributes:
        model: the modules.
        blocks: of the model.
        folder: of the checkpoint that is read, None for a model in memory.
        dtype: name of the dtype that replaces the checkpoint's, None where the checkpoint's stays.
        unbuilt: names of stored tensors that the model has no module for; `tensors_outside_blocks` yields them too.
        unbuilt_bytes: size of these tensors.
    """

    model: PreTrainedModel
    blocks: list[Block]
    folder: Path | None
    dtype: str | None
    unbuilt: list[str]
    unbuilt_bytes: int

    def embeddings(self) -> AbstractContextManager[None]:
        """While open, the inner model has its weights outside the blocks: embeddings and final norm, but no head."""

    def outside_blocks(self) -> AbstractContextManager[None]:
        """While open, the whole model has its weights outside the blocks, the head too."""

    def opened(self, block: Block, device: torch.device) -> AbstractContextManager[None]:
        """While open, the block has its weights on `device`."""

    def prefetch(self, block: Block) -> None:
        """Start reading the block, which will be opened soon."""

    def stored(self, block: Block) -> dict[str, Tensor]:
        """The tensors of an open block, with the names and layout of the checkpoint's files."""

    def name_in_files(self, name: str) -> str:
        """The name in the checkpoint's files of the linear that the model calls `name`."""

    def load_tensors(self, block: Block, tensors: Mapping[str, Tensor]) -> None:
        """Load into an open block tensors that `stored` returned for it."""

    def tensors_outside_blocks(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that belong to no block, one by one, with their names in the checkpoint's files."""


class DecoderInMemory:
    """A model that is loaded whole; changes to its blocks stay."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.blocks = find_blocks(model)
        self.folder: Path | None = None
        self.dtype: str | None = None
        self.unbuilt: list[str] = []
        self.unbuilt_bytes = 0

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        """Nothing to do: the embeddings are in memory."""
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
        """Nothing to do: the block is in memory."""

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
        """See `Decoder`; of tied tensors, only the one that loading expects."""
        inside = tuple(f"{block.name}." for block in self.blocks)
        state = remove_tied_weights_from_state_dict(dict(self.model.state_dict()), self.model)
        outside = {name: tensor for name, tensor in state.items() if not name.startswith(inside)}
        yield from revert_weight_conversion(self.model, outside).items()


class DecoderOnDisk:
    """A folder of safetensors, of which the embeddings or one block at a time are in memory.

    Parameters are on the meta device until they are read. Buffers (rotary frequencies, masks) are real. transformers'
    own conversion turns the names and layouts of the files into those of the modules, and back.

    Args:
        source: a local folder.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        BesaError: the configuration or the weight files are damaged, or are of no decoder that besa can prune.
    """

    def __init__(self, source: Source, dtype: str = "auto") -> None:
        assert source.folder is not None
        self.folder: Path | None = source.folder
        self.dtype = None if dtype == "auto" else dtype
        self._files = open_files(source.folder)
        config = read_config(source)
        refuse_quantized(source, config)
        config.dtype = getattr(torch, dtype) if self.dtype else config.dtype or self._files.dtype()
        with torch.device("meta"):  # sizes are checked before anything of that size is allocated
            empty = skeleton(source, config)
        self._layout = Layout(source.name, self._files, empty, find_blocks(empty))
        self.model = skeleton(source, config)
        self.model.generation_config = read_generation_config(source, self.model)
        self.blocks = find_blocks(self.model)
        self.unbuilt, self.unbuilt_bytes = self._layout.unbuilt, self._layout.unbuilt_bytes

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        """Read the embeddings and the final norm, and free them afterwards."""
        with self._read_outside_blocks(self._layout.embeddings):
            yield

    @contextmanager
    def outside_blocks(self) -> Iterator[None]:
        """Read everything outside the blocks, and free it afterwards."""
        with self._read_outside_blocks([*self._layout.embeddings, *self._layout.head]):
            yield

    @contextmanager
    def _read_outside_blocks(self, names: list[str]) -> Iterator[None]:
        inside = {module for block in self.blocks for module in block.module.modules()}
        try:
            self._layout.read(self.model, names)
            tie(self.model)
            yield
        finally:
            for module in self.model.modules():
                if module not in inside:
                    _free(module)

    @contextmanager
    def opened(self, block: Block, device: torch.device) -> Iterator[None]:
        """Read the block, and free it afterwards."""
        modules = list(block.module.modules())
        try:
            self._layout.read(self.model, self._layout.of_block[block.name])
            block.module.to(device)
            yield
        finally:
            for module in modules:
                _free(module)

    def prefetch(self, block: Block) -> None:
        """See `Decoder`: the block is read while another one is computed."""
        self._files.prefetch(self._layout.of_block[block.name])

    def check_writable(self) -> None:
        """Check before the work that blocks can be written in the layout of the files.

        Raises:
            BesaError: they cannot.
        """
        self._layout.check_way_back()

    def stored(self, block: Block) -> dict[str, Tensor]:
        """See `Decoder`; without another `dtype`, numbers that did not change keep their dtype and bits."""
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
        """See `Decoder`; also the tensors that the model has no module for."""
        yield from self._layout.tensors_outside_blocks(rounded=self.dtype is not None)


def _free(module: nn.Module) -> None:
    """Move the module's own parameters back to the meta device; buffers stay."""
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
