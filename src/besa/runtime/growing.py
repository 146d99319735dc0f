"""A KV cache that grows in place; transformers' own is copied as a whole for each token.

Shape suffixes: N sequences, K KV heads, T tokens, D head dimension.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from besa.kernels.decoding import Place

MORE = 128  # tokens that there is room for at a time


class Room:
    """Keys and values of a layer of a cache, with free memory for further tokens.

    Attributes:
        place: for kernels.

    Args:
        layer: that has tokens, and grows with each.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        self._keys_NKTD, self._values_NKTD = _larger(layer.keys), _larger(layer.values)
        self._parts = layer.keys, layer.values  # what the layer has of them, or had as they were made
        self._addresses = layer.keys.data_ptr(), layer.values.data_ptr()  # of these parts
        addresses = self._keys_NKTD.data_ptr(), self._values_NKTD.data_ptr()
        self.place = Place(*addresses, self._keys_NKTD.stride(1), self._values_NKTD.stride(1))

    def serves(self, layer: DynamicLayer) -> bool:
        """Whether one more token fits in, and the layer has not been changed elsewhere.

        Any other code that changes a layer replaces its tensors, or moves their memory, as torch does for another
        process.
        """
        keys, values = self._parts
        return (
            keys is layer.keys
            and values is layer.values
            and keys.size(2) < self._keys_NKTD.size(2)
            and (keys.data_ptr(), values.data_ptr()) == self._addresses
        )

    def grow(self, layer: DynamicLayer) -> None:
        """Add one token to the layer; its keys and values have been written."""
        tokens = layer.keys.size(2) + 1
        self._parts = self._keys_NKTD.narrow(2, 0, tokens), self._values_NKTD.narrow(2, 0, tokens)
        self._addresses = self.place.keys, self.place.values
        layer.keys, layer.values = self._parts


_ROOMS: WeakKeyDictionary[DynamicLayer, Room] = WeakKeyDictionary()  # not in the layers, which are copied and pickled


def room_of(layer: DynamicLayer) -> Room:
    """The room of a layer for one more token; the token counts only after `grow`."""
    room = _ROOMS.get(layer)
    if room is None or not room.serves(layer):
        room = _ROOMS[layer] = Room(layer)
    return room


def _larger(part_NKTD: Tensor) -> Tensor:
    sequences, shared, tokens, width = part_NKTD.shape
    with torch.inference_mode(False):  # a tensor of that mode could not be written to without it
        larger_NKTD = part_NKTD.new_empty(sequences, shared, tokens + MORE, width)
    larger_NKTD[:, :, :tokens] = part_NKTD
    return larger_NKTD
