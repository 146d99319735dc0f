"""Leaving blocks out of a checkpoint: the depth in its configuration, and the numbers in the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from besa.errors import BesaError
from besa.models.blocks import Block
from besa.models.layers import biases
from besa.storage.formats.container import DEPTHS

# Keys of configurations that hold numbers of blocks, and of those that say how many of the first blocks are different.
# Lists with one entry for each block need no name here.
NUMBERS = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "local_layer_ids", "ple_layer_ids")
FIRST = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index")
NOT_BY_BLOCK = ("token_id", "token_ids", "architectures")  # ends of keys of other lists, which may be as long


def is_empty(block: Block) -> bool:
    """Whether all matrices of an open block and their biases are zero."""
    matrices = (block.weight(name) for name in block.prunables)
    others = (block.module.get_parameter(name) for name in biases(block, block.prunables))
    return not any(bool(tensor.any()) for tensor in (*matrices, *others))


class Renumbering:
    """The blocks that stay, with their new numbers.

    Args:
        blocks: of the model.
        gone: numbers of the blocks that are left out.
    """

    def __init__(self, blocks: list[Block], gone: Collection[int]) -> None:
        self.gone = frozenset(gone)
        self.staying = [block for block in blocks if block.index not in self.gone]
        self._number = {block.index: place for place, block in enumerate(self.staying)}
        self._depth = len(blocks)
        self._stack = blocks[0].name.rpartition(".")[0]
        self._starts: set[str] = set()  # of the names of all tensors of blocks in the files

    def in_files(self, block: Block, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a block by their new names in the files.

        Raises:
            BesaError: a name does not show the number of the block.
        """
        pattern = re.compile(rf"((?:.*?\.)?{re.escape(self._stack.rpartition('.')[2])}\.){block.index}(\..*)")
        renamed = {}
        for name, tensor in tensors.items():
            match = pattern.fullmatch(name)
            if match is None:
                raise BesaError(f"{name} does not show the number of its block, so no blocks can be left out.")
            self._starts.add(match[1])
            renamed[f"{match[1]}{self._number[block.index]}{match[2]}"] = tensor
        return renamed

    def outside(self, name: str) -> str:
        """The new name of a tensor outside the blocks; multi-token-prediction (MTP) layers are numbered after them."""
        for start in self._starts:
            number, dot, rest = name.removeprefix(start).partition(".")
            if name.startswith(start) and dot and number.isdigit() and int(number) >= self._depth:
                return f"{start}{int(number) - len(self.gone)}.{rest}"
        return name

    def in_model(self, names: Iterable[str]) -> dict[str, str]:
        """New names in the model by the old ones; those of blocks that are left out are missing."""
        renamed = {}
        for name in names:
            number, _, rest = name.removeprefix(f"{self._stack}.").partition(".")
            if not name.startswith(f"{self._stack}.") or not number.isdigit():
                renamed[name] = name
            elif int(number) in self._number:
                renamed[name] = f"{self._stack}.{self._number[int(number)]}.{rest}"
        return renamed

    def config(self, content: dict[str, Any], like: PreTrainedConfig) -> dict[str, Any]:
        """A config.json with the new depth, and with what it says by block for the blocks that stay.

        Args:
            content: of the file.
            like: the configuration that transformers reads from it; it knows what the file leaves to defaults.
        """
        text = like.get_text_config()
        own = next((key for key, value in vars(like).items() if value is text and key in content), None)
        changed = self._changed(text)
        return content | ({own: content[own] | changed} if own else changed)

    def _changed(self, text: PreTrainedConfig) -> dict[str, Any]:
        """The keys of the configuration of the text decoder that change."""
        changed: dict[str, Any] = {
            text.attribute_map.get(key, key): len(self.staying) for key in DEPTHS if hasattr(text, key)
        }
        for key, value in text.to_dict().items():
            if key in NUMBERS and isinstance(value, list | tuple):
                changed[key] = [self._number[index] for index in value if index in self._number]
            elif key in FIRST and isinstance(value, int):
                changed[key] = sum(index < value for index in self._number)
            elif isinstance(value, list | tuple) and len(value) == self._depth and not key.endswith(NOT_BY_BLOCK):
                changed[key] = [value[index] for index in self._number]
        return changed

    def check_same(self, written: list[Block]) -> None:
        """Check that the blocks of the smaller configuration are what the blocks that stay are.

        Args:
            written: blocks of a model of that configuration.

        Raises:
            BesaError: a setting of a block differs, such as its window.
        """
        for block, smaller in zip(self.staying, written, strict=True):
            before, after = list(block.module.modules()), list(smaller.module.modules())
            pairs = zip(before, after, strict=False)
            if len(before) != len(after) or not all(_same(*pair, block.index, smaller.index) for pair in pairs):
                raise BesaError(
                    f"{block.name} would be another kind of block as number {smaller.index}, and its family's "
                    "configuration cannot say otherwise: choose other blocks with --skip, or another allocation."
                )


def _same(old: nn.Module, new: nn.Module, index: int, number: int) -> bool:
    """Whether two modules have the same plain attributes, but for the number of their block, `index` and `number`."""
    before, after = _settings(old), _settings(new)
    numbered = {key: number for key, value in before.items() if type(value) is int and value == index}
    same = all(after.get(key) in (value, numbered.get(key, value)) for key, value in before.items())
    return same and before.keys() == after.keys()


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module, None among them, such as the window of full attention."""
    return {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str | None)}
