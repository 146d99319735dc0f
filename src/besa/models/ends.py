"""The two ends of a model, which know its vocabulary: the embeddings and the head."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from besa.errors import BesaError


def ends(model: PreTrainedModel) -> list[str]:
    """Names of the modules whose weights may be stored as codes: the embeddings, and the head if there is one.

    Args:
        model: may be on the meta device.

    Raises:
        BesaError: the embeddings are no embedding of torch or have parameters of their own, or the head is no plain
            linear.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    alone = isinstance(embeddings, nn.Embedding) and len(list(embeddings.parameters())) == 1  # Inkling's have a norm
    if not alone or (head is not None and type(head) is not nn.Linear):
        own = head if alone else embeddings
        raise BesaError(
            f"The head and the embeddings cannot be stored as codes, as this model has a {type(own).__name__}: "
            "leave out --head."
        )
    return [name for name, module in model.named_modules() if module is embeddings or module is head]
