"""Head and embeddings of a packed checkpoint, stored as codes of eight bits.

If they are tied, one of them holds the codes and the other borrows them.

Shape suffixes: N tokens, O rows, I columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from besa.errors import BesaError
from besa.kernels import row_codes
from besa.runtime.casting import cast
from besa.runtime.derivatives import refuse
from besa.runtime.tracing import coded_product, tracing
from besa.storage.formats.container import tensors_of_codes
from besa.storage.formats.row_codes import RowCodes


class Coded(nn.Module):
    """A module with a matrix of codes, for inference; its buffers are named as the tensors of the container.

    The steps are a parameter: transformers asks the parameters of a model for its dtype and device, and a family whose
    norms have no weights may have no others.

    Args:
        matrix: its tensors may be memory-mapped and are not copied; or the module that holds it.
    """

    weight_codes: Tensor
    weight_scale: Tensor

    def __init__(self, matrix: RowCodes | Coded) -> None:
        super().__init__()
        self._lender = (matrix,) if isinstance(matrix, Coded) else ()  # no module of this one, so a tuple
        if isinstance(matrix, RowCodes):
            self.keep(matrix)

    def keep(self, matrix: RowCodes) -> None:
        """Take another matrix of the same shape."""
        for name, tensor in tensors_of_codes(matrix).items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)

    @property
    def matrix(self) -> RowCodes:
        """The matrix of codes, built from the tensors, which loading or moving the module replaces."""
        for lender in self._lender:
            return lender.matrix
        if self.weight_codes.is_meta or self.weight_scale.is_meta:
            raise BesaError("Packed weights cannot be offloaded: leave them in memory, or unpack the model first.")
        return RowCodes(self.weight_codes, self.weight_scale)

    @property
    def weight(self) -> Tensor:
        """The matrix (O, I), made dense at each access."""
        return self.matrix.unpack()


class CodedLinear(Coded):
    """y = x Wᵀ + b.

    Args:
        matrix: as of `Coded`.
        bias: b (O,), or None.
    """

    def __init__(self, matrix: RowCodes | Coded, bias: nn.Parameter | None) -> None:
        super().__init__(matrix)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Output (…, O) for inputs (…, I) of the dtype of the matrix; under autocast, of any.

        Raises:
            BesaError: a derivative is wanted, or `x` has another dtype without autocast.
        """
        refuse(x)
        matrix = self.matrix
        if x.dtype != matrix.dtype:
            return cast(self.forward, x, matrix.dtype)
        if tracing():
            y = coded_product(x, matrix)
        else:
            rows, columns = matrix.codes_OI.shape
            y = row_codes.multiplied(x.reshape(-1, columns), matrix).view(*x.shape[:-1], rows)
        return y if self.bias is None else y + self.bias

    def dense(self, weight: nn.Parameter) -> nn.Linear:
        """The linear of torch with this weight."""
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=self.bias is not None, device="meta")
        linear.weight = weight
        linear.register_parameter("bias", self.bias)
        return linear


class CodedEmbedding(Coded):
    """An embedding whose rows are made dense when their tokens come.

    A family may do something of its own with them, such as scale them. A module that is more than torch's is therefore
    called as it is, with the rows of these tokens as its weight.

    Args:
        matrix: as of `Coded`.
        family: the module that had the dense matrix.
    """

    def __init__(self, matrix: RowCodes | Coded, family: nn.Embedding) -> None:
        super().__init__(matrix)
        self._padding = family.padding_idx
        family.padding_idx = None  # it concerns gradients only, and must be a row
        del family.weight
        family.weight = torch.empty(0)  # no parameter, as it has no place in a file
        family.weight.__dict__["_is_hf_initialized"] = True  # else transformers would draw numbers for it
        self.family = family

    @property
    def token_ids(self) -> int:
        """Number of token ids that have embeddings."""
        return len(self.matrix.codes_OI)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings (…, I) of token ids of any shape.

        Raises:
            IndexError: there is no such token.
        """
        rows_NI, family = self.matrix.rows(tokens.flatten()), self.family
        hooked = family._forward_hooks or family._forward_pre_hooks or "forward" in vars(family)
        if type(family) is nn.Embedding and family.max_norm is None and not hooked:
            return rows_NI.view(*tokens.shape, -1)
        places = torch.arange(len(rows_NI), device=tokens.device).view_as(tokens)
        embedded: Tensor = functional_call(family, {"weight": rows_NI}, (places,))
        return embedded

    def dense(self, weight: nn.Parameter) -> nn.Embedding:
        """The family's module with this weight."""
        self.family.weight = weight
        self.family.padding_idx = self._padding
        return self.family
