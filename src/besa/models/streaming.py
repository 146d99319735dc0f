"""A decoder of which one block at a time has its weights: from a checkpoint on disk, or from a model in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from besa.models.blocks import Block
from besa.models.fewer import Kept, lent, selected, take_out
from besa.models.finding import find_blocks
from besa.models.layout import Layout, in_files, load_tensors, tie
from besa.models.loading import read_config, read_generation_config, refuse_quantized, skeleton
from besa.models.mixtures import Fewer, changed
from besa.models.source import Source
from besa.models.transfers import Ahead, at_home
from besa.models.visiting import Visit, copies, visiting
from besa.storage.formats.container import open_files
from besa.storage.weights import WeightFiles


class Decoder(Protocol):
    """A model as the block loop uses it, wherever its weights are.

    Attributes:
        model: the modules.
        blocks: of the model.
        folder: of the checkpoint that is read, None for a model in memory.
        dtype: name of the dtype that replaces the checkpoint's, None where the checkpoint's stays.
        unbuilt: names of stored tensors that the model has no module for; `tensors_outside_blocks` yields them too.
        unbuilt_bytes: size of these tensors.
        lasting: whether a block that was closed has its changes when it is opened again.
        settings: keys of the configuration with values that differ from those in the folder.
    """

    model: PreTrainedModel
    blocks: list[Block]
    folder: Path | None
    dtype: str | None
    unbuilt: list[str]
    unbuilt_bytes: int
    lasting: bool
    settings: dict[str, int]

    def with_experts(self, fewer: Fewer, kept: Kept) -> tuple[Decoder, Decoder]:
        """The decoder with these experts, which has the place of this one, and one that still has all of them."""

    def embeddings(self, device: torch.device) -> AbstractContextManager[None]:
        """While open, the inner model has on `device` what is outside its blocks: embeddings and final norm."""

    def outside_blocks(self, device: torch.device) -> AbstractContextManager[None]:
        """While open, the whole model has on `device` what is outside the blocks, the head too."""

    def opened(self, block: Block, device: torch.device) -> AbstractContextManager[None]:
        """While open, the block has its weights on `device`."""

    def prefetch(self, block: Block, device: torch.device) -> None:
        """Begin to bring the block to `device`, where it will be opened soon."""

    def stored(self, block: Block) -> dict[str, Tensor]:
        """The tensors of an open block on the host, with the names and layout of the checkpoint's files.

        It is the last that is done with an open block, which may have left its device after it.
        """

    def stored_outside(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters outside the blocks, which are open, on the host, with their names and dtypes in the files.

        Args:
            names: of the parameters in the model.
        """

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
        self.lasting = True
        self.settings: dict[str, int] = {}
        self._visits: dict[str, Visit] = {}  # of open blocks, by name
        self._ahead: Ahead[int] = Ahead()

    def with_experts(self, fewer: Fewer, kept: Kept) -> tuple[Decoder, Decoder]:
        """See `Decoder`: the model loses its experts in place, and the other shares the rest of its tensors."""
        whole = DecoderInMemory(lent(self.model))
        take_out(self.model, fewer, kept)
        return DecoderInMemory(self.model), whole

    def embeddings(self, device: torch.device) -> AbstractContextManager[None]:
        """Move what is outside the blocks to `device`, and back."""
        return visiting(_outside(self.model.base_model, self.blocks), device)

    def outside_blocks(self, device: torch.device) -> AbstractContextManager[None]:
        """Move what is outside the blocks, and the head too, to `device`, and back."""
        return visiting(_outside(self.model, self.blocks), device)

    @contextmanager
    def opened(self, block: Block, device: torch.device) -> Iterator[None]:
        """Move the block to `device`, and what has changed back."""
        with _eager_experts(self.model):
            self._visits[block.name] = Visit(block.module.modules(), device, self._ahead.take(block.name, device))
            try:
                yield
            finally:
                self._visits.pop(block.name).end()

    def prefetch(self, block: Block, device: torch.device) -> None:
        """See `Decoder`."""
        self._ahead.begin(block.name, device, _bytes(block), lambda: copies(block.module.modules(), device))

    def stored(self, block: Block) -> dict[str, Tensor]:
        """See `Decoder`; the block moves back."""
        self._visits[block.name].end()
        return in_files(self.model, block)

    def stored_outside(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See `Decoder`."""
        state = at_home({name: self.model.get_parameter(name).detach() for name in names})
        tensors: dict[str, Tensor] = revert_weight_conversion(self.model, state)
        return tensors

    def name_in_files(self, name: str) -> str:
        """See `Decoder`."""
        return name

    def load_tensors(self, block: Block, tensors: Mapping[str, Tensor]) -> None:
        """See `Decoder`."""
        conversions, device = get_model_conversion_mapping(self.model), next(block.module.parameters()).device
        load_tensors(self.model, tensors, conversions, self.model.name_or_path, device)

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
        files: in place of those of the folder.
        settings: keys of the configuration with other values than in the folder.

    Raises:
        BesaError: the configuration or the weight files are damaged, or are of no decoder that besa can prune.
    """

    def __init__(
        self,
        source: Source,
        dtype: str = "auto",
        files: WeightFiles | None = None,
        settings: Mapping[str, int] | None = None,
    ) -> None:
        assert source.folder is not None
        self.folder: Path | None = source.folder
        self.dtype = None if dtype == "auto" else dtype
        self.settings = dict(settings or {})
        self._source = source
        self._files = files or open_files(source.folder)
        config = changed(read_config(source), self.settings)
        refuse_quantized(source, config)
        config.dtype = getattr(torch, dtype) if self.dtype else config.dtype or self._files.dtype()
        with torch.device("meta"):  # sizes are checked before anything of that size is allocated
            empty = skeleton(source, config)
        self._layout = Layout(source.name, self._files, empty, find_blocks(empty))
        self.model = skeleton(source, config)
        self.model.generation_config = read_generation_config(source, self.model)
        self.blocks = find_blocks(self.model)
        self.unbuilt, self.unbuilt_bytes = self._layout.unbuilt, self._layout.unbuilt_bytes
        self.lasting = False
        self._ahead: Ahead[str] = Ahead()

    def with_experts(self, fewer: Fewer, kept: Kept) -> tuple[Decoder, Decoder]:
        """See `Decoder`: the same files, of which the other experts are not read."""
        files = selected(self._files, self._layout, fewer, kept)
        return DecoderOnDisk(self._source, self.dtype or "auto", files, fewer.settings), self

    @contextmanager
    def embeddings(self, device: torch.device) -> Iterator[None]:
        """Read the embeddings and the final norm, and free them afterwards."""
        with self._read_outside_blocks(self._layout.embeddings, device):
            yield

    @contextmanager
    def outside_blocks(self, device: torch.device) -> Iterator[None]:
        """Read everything outside the blocks, and free it afterwards."""
        with self._read_outside_blocks([*self._layout.embeddings, *self._layout.head], device):
            yield

    @contextmanager
    def _read_outside_blocks(self, names: list[str], device: torch.device) -> Iterator[None]:
        modules = _outside(self.model, self.blocks)
        with visiting(modules, device):  # buffers, which are not in the files
            try:
                self._layout.load_tensors(self.model, self._layout.read(names, device), device)
                tie(self.model)
                yield
            finally:
                for module in modules:
                    _free(module)

    @contextmanager
    def opened(self, block: Block, device: torch.device) -> Iterator[None]:
        """Read the block, and free it afterwards."""
        modules = list(block.module.modules())
        with visiting(modules, device):
            try:
                tensors = self._ahead.take(block.name, device)
                if tensors is None:
                    tensors = self._layout.read(self._layout.of_block[block.name], device)
                self._layout.load_tensors(self.model, tensors, device)
                del tensors
                yield
            finally:
                for module in modules:
                    _free(module)

    def prefetch(self, block: Block, device: torch.device) -> None:
        """See `Decoder`: the block is read while another one is computed."""
        names = self._layout.of_block[block.name]
        self._files.prefetch(names)
        self._ahead.begin(block.name, device, _bytes(block), lambda: self._layout.read(names, device))

    def check_writable(self) -> None:
        """Check before the work that blocks can be written in the layout of the files.

        Raises:
            BesaError: they cannot.
        """
        self._layout.check_way_back()

    def stored(self, block: Block) -> dict[str, Tensor]:
        """See `Decoder`; without another `dtype`, numbers that did not change keep their dtype and bits."""
        return self._layout.stored(block, rounded=self.dtype is not None)

    def stored_outside(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See `Decoder`."""
        state = at_home({name: self.model.get_parameter(name).detach() for name in names})
        return self._layout.stored_outside(state, rounded=self.dtype is not None)

    def name_in_files(self, name: str) -> str:
        """See `Decoder`."""
        return self._layout.name_in_files(name)

    def load_tensors(self, block: Block, tensors: Mapping[str, Tensor]) -> None:
        """See `Decoder`."""
        self._layout.load_tensors(self.model, tensors, next(block.module.parameters()).device)

    def tensors_outside_blocks(self) -> Iterator[tuple[str, Tensor]]:
        """See `Decoder`; also the tensors that the model has no module for."""
        yield from self._layout.tensors_outside_blocks(rounded=self.dtype is not None)


@contextmanager
def _eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """While open, experts are multiplied one by one, as grouped products cannot be watched."""
    if not model._can_set_experts_implementation():
        yield
        return
    before = model.get_experts_implementation()
    try:
        model.set_experts_implementation("eager")
        yield
    finally:
        model.set_experts_implementation(before)


def _outside(model: nn.Module, blocks: list[Block]) -> list[nn.Module]:
    """The modules of a model that are not in a block."""
    inside = {module for block in blocks for module in block.module.modules()}
    return [module for module in model.modules() if module not in inside]


def _bytes(block: Block) -> int:
    """Size of the parameters of a block."""
    return sum(parameter.nbytes for parameter in block.module.parameters())


def _free(module: nn.Module) -> None:
    """Move the module's own parameters back to the meta device; buffers stay."""
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
