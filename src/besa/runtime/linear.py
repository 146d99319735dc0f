"""A linear layer that computes with the bitmask of its weight.

Shape suffixes: N tokens, O rows (output channels), I columns (input channels).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from besa.errors import BesaError
from besa.kernels import sparse
from besa.kernels.sparse_native import Entry
from besa.runtime.casting import cast
from besa.runtime.derivatives import refuse
from besa.runtime.kept import version
from besa.runtime.tracing import sparse_product, tracing
from besa.storage.formats.bitmask import Bitmask
from besa.storage.formats.container import MASK, OFFSETS, SCALE, VALUES, ZERO, tensors_of


class SparseLinear(nn.Module):
    """y = x Wᵀ + b with the packed W, for inference; its buffers are named as the tensors of the container.

    Args:
        weight: W; its tensors may be memory-mapped and are not copied.
        bias: b (O,), or None.
    """

    def __init__(self, weight: Bitmask, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits = weight.bits
        self.keep(weight)
        self.bias = bias

    def keep(self, weight: Bitmask) -> None:
        """Take another W of the same shape."""
        for name, tensor in tensors_of(weight).items():
            self.register_buffer(name, tensor.to(weight.values.device))
        self._product: sparse.Product | None = None
        self._sound = True  # whether its numbers are known to fit each other
        self._places: list[int] = []  # of the numbers that the product is made of
        self._versions: list[int] = []
        self._dtype = weight.dtype

    @property
    def bitmask(self) -> Bitmask:
        """W as packed, built from the buffers, which loading or moving the module replaces."""
        return self._of(self._buffers)

    def _of(self, buffers: dict[str, Any]) -> Bitmask:
        """W made of these buffers."""
        return Bitmask(
            (self.out_features, self.in_features),
            buffers[MASK],
            buffers[VALUES],
            buffers[OFFSETS],
            buffers.get(SCALE),
            buffers.get(ZERO),
            self.bits,
        )

    @property
    def weight(self) -> Tensor:
        """W (O, I), unpacked at each access, for families that read a weight without calling its linear (Mamba)."""
        return sparse.unpacked(self.bitmask)

    def forward(self, x: Tensor) -> Tensor:
        """Output (…, O) for inputs (…, I) of the dtype of the weight; under autocast, of any.

        Raises:
            BesaError: a derivative is wanted, or `x` has another dtype without autocast.
        """
        refuse(x)
        if tracing():
            weight = self.bitmask
            if x.dtype != weight.dtype:
                return cast(self.forward, x, weight.dtype)
            return self._biased(sparse_product(x, weight))
        product = self.product
        if x.dtype != self._dtype:
            return cast(self.forward, x, self._dtype)
        return self._biased(product(x))

    @property
    def product(self) -> sparse.Product:
        """The product with W as its buffers are now.

        Raises:
            BesaError: the numbers do not fit each other, as of a layer that was given memory and no numbers.
        """
        numbers = [tensor for tensor in self._buffers.values() if tensor is not None]
        places = [tensor.data_ptr() for tensor in numbers]
        product = self._product
        stale = product is not None and product.prepacked and [*map(version, numbers)] != self._versions
        if product is None or places != self._places or stale:
            if not self._sound:
                self.bitmask.check("of a layer that was moved")
                self._sound = True
            product = self._product = sparse.Product(self.bitmask)
            self._places, self._versions = places, [*map(version, numbers)]
            self._dtype = self.bitmask.dtype
        return product

    def entry(self, dtype: torch.dtype) -> Entry | None:
        """The product with one row of x of a dtype, for C code; None if there is no kernel for it."""
        return self.product.entry(dtype)

    def _biased(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Sizes as nn.Linear shows them, the kind of the packed weight, and its bits per weight."""
        weight = self.bitmask
        bits = 8 * weight.nbytes / (self.out_features * self.in_features)
        return f"{self.in_features}, {self.out_features}, kind={weight.kind}, bits={bits:.2f}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """Move to another device; the dtype cannot change.

        Raises:
            BesaError: the dtype would change.
        """
        self.check_dtype(fn)
        before = {name: tensor.data_ptr() for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = any(self.get_buffer(name).data_ptr() != place for name, place in before.items())
        if moved and self.get_buffer(MASK).is_cpu:  # elsewhere, the host would wait for every number
            self._sound = False  # `to_empty` leaves what was in the memory
        self._product = None
        return self

    def check_dtype(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Check a function before it is applied to all tensors.

        Raises:
            BesaError: the dtype would change.
        """
        dtype = self.bitmask.dtype
        if fn(torch.empty(0, dtype=dtype)).dtype != dtype:
            raise BesaError("Packed linears keep their dtype: ask for another one when you load, with dtype=.")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Load those parts of W that are there.

        Raises:
            BesaError: they do not fit the parts that are missing, such as masks without their values; or they are as
                many as the layer has no room for. Nothing has changed then.
        """
        given = {name: state_dict.get(prefix + name, buffer) for name, buffer in self._buffers.items()}
        self._of(given).check(prefix.removesuffix("."))
        if any(tensor is not None and tensor.shape != self.get_buffer(name).shape for name, tensor in given.items()):
            raise BesaError(
                f"The sparse weight {prefix.removesuffix('.')} has another number of zeros than the model's: load the "
                "checkpoint that it is of."
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._product, self._sound = None, True  # the product may hold a copy of the numbers

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles, without memory addresses."""
        return {**self.__dict__, "_product": None}
