"""A cache of keys and values that grows in place: transformers' own copies all of it for each token.

Shape suffixes: N sequences, K heads of keys and values, T tokens, D numbers of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

MORE = 128  # tokens that there is room for at a time


@dataclass
class _Room:
    """Keys and values with room behind them, and the part of each that the cache has.

    The parts tell whether the cache still is as it was left here: whatever else changes it puts others in their place.
    """

    keys_NKTD: Tensor
    values_NKTD: Tensor
    parts: tuple[Tensor, Tensor]


_ROOMS: WeakKeyDictionary[DynamicLayer, _Room] = WeakKeyDictionary()  # not in the layers, which are copied and pickled


def grow(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer of a cache with room for one more token, whose numbers are yet to be written.

    Args:
        layer: one that has tokens, and grows with each.
    """
    room, tokens = _ROOMS.get(layer), layer.keys.size(2)
    own = room is not None and room.parts[0] is layer.keys and room.parts[1] is layer.values
    if room is None or not own or tokens == room.keys_NKTD.size(2):
        room = _Room(_larger(layer.keys), _larger(layer.values), (layer.keys, layer.values))
        _ROOMS[layer] = room
    room.parts = room.keys_NKTD[:, :, : tokens + 1], room.values_NKTD[:, :, : tokens + 1]
    layer.keys, layer.values = room.parts
    return room.parts


def _larger(part_NKTD: Tensor) -> Tensor:
    sequences, shared, tokens, width = part_NKTD.shape
    with torch.inference_mode(False):  # a tensor of that mode could not be written to without it
        larger_NKTD = part_NKTD.new_empty(sequences, shared, tokens + MORE, width)
    larger_NKTD[:, :, :tokens] = part_NKTD
    return larger_NKTD
