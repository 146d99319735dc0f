"""Whether the files of a checkpoint hold the model that its config.json says, found out from headers alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from besa.errors import BesaError
from besa.models.blocks import find_blocks
from besa.models.streaming import renaming


def check_complete(source: str, shapes: Iterable[tuple[str, tuple[int, ...]]], empty: PreTrainedModel) -> None:
    """Refuse files that lack a weight of the model, or hold a block that the model does not have.

    Args:
        source: what the user called the checkpoint.
        shapes: of the tensors by their names in the files; of a weight stored as codes, the shape that it has dense.
        empty: the model that config.json says; its weights may be on the meta device.

    Raises:
        BesaError: so it is.
    """
    state = empty.state_dict()
    renamed = renaming(empty, get_model_conversion_mapping(empty))
    blocks = {block.name for block in find_blocks(empty)}
    stack = min(blocks).rpartition(".")[0]
    spare = "|".join(empty._keys_to_ignore_on_load_unexpected or ["(?!)"])  # such as layers that predict further tokens
    sizes: Counter[str] = Counter()
    for stored, shape in shapes:
        name, merged = renamed(stored)
        sizes[name] += math.prod(shape)
        if name in state and not merged and shape != tuple(state[name].shape):
            raise BesaError(
                f"{source}: the weight {name} is {shape}, its config.json says {tuple(state[name].shape)}: it is "
                "damaged, or belongs to another checkpoint."
            )
        beyond = re.match(rf"{re.escape(stack)}\.\d+(?=\.)", name)
        if beyond and beyond[0] not in blocks and not re.search(spare, name):
            raise BesaError(
                f"{source} holds {beyond[0]}, a block more than its config.json says: it is damaged, or belongs to "
                "another checkpoint."
            )
    for name, parameter in empty.named_parameters(remove_duplicate=False):
        found = sizes[name] or sizes[empty.all_tied_weights_keys.get(name, name)]
        if found < parameter.numel():  # of one that is merged of several, a part
            what = f"a part of the weight {name}" if found else f"the weight {name}"
            raise BesaError(f"{source} lacks {what}: the checkpoint is incomplete.")
