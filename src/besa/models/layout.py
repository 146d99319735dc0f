"""The mapping between the tensors of a checkpoint's files and those of the model, in both directions.

Names and layouts in the files may differ from those of the modules, mostly for experts. transformers' own conversion
turns one into the other, and back.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from besa.counting.precision import dtype_name
from besa.errors import BesaError
from besa.models.blocks import Block
from besa.models.quiet import model_explained, quiet
from besa.models.transfers import at_home
from besa.storage.weights import FLOATS, WeightFiles, is_finite, not_finite
from besa.system.devices import CPU

# Multi-token-prediction (MTP) layers come after the blocks, and transformers does not build them.
FURTHER = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


class Layout:
    """The tensors of a checkpoint's files, by the part of the model they belong to.

    Attributes:
        of_block: names in the files by name of the block.
        embeddings: names of the tensors of the inner model outside its blocks: embeddings, the final norm.
        head: names of the tensors outside the inner model.
        unbuilt: names of tensors that transformers builds no module for: multi-token-prediction (MTP) layers,
            vision towers, buffers of older releases.
        further: of these, the names of tensors of MTP layers, which come after the blocks.

    Args:
        source: name of the checkpoint, for error messages.
        files: of the checkpoint.
        model: on the meta device, buffers too.
        blocks: of the model.

    Raises:
        BesaError: a weight is missing, has another shape, or has a dtype that besa does not compute in; or the files
            have more blocks than the configuration says.
    """

    def __init__(self, source: str, files: WeightFiles, model: PreTrainedModel, blocks: list[Block]) -> None:
        self._source, self._files, self._model = source, files, model
        self._conversions = get_model_conversion_mapping(model)
        self._dtypes = files.dtypes()
        self._places: dict[str, str] = {}  # names in the model by name in the files, of tensors that are not merged
        self._names: dict[str, str] = {}  # the inverse
        # names in the model by name in the files, of tensors that are parts of others
        self._merged: dict[str, str] = {}
        self.of_block: dict[str, list[str]] = {block.name: [] for block in blocks}
        self.embeddings: list[str] = []
        self.head: list[str] = []
        self.unbuilt: list[str] = []
        self.further: set[str] = set()
        self._blocks = blocks
        self._parameters = dict.fromkeys(name for name, _ in model.named_parameters(remove_duplicate=False))
        self._sort(blocks)
        self._check()

    def _sort(self, blocks: list[Block]) -> None:
        """Find the part of the model that every stored tensor belongs to."""
        state, renamed = self._model.state_dict(), renaming(self._model, self._conversions)
        inner = {id(parameter) for parameter in self._model.base_model.parameters()}
        head = {name for name, parameter in self._model.named_parameters() if id(parameter) not in inner}
        prefix = f"{self._model.base_model_prefix}."  # which files may leave out, as GPT-2's do
        stack = blocks[0].name.rpartition(".")[0].removeprefix(prefix)
        later = re.compile(rf"(?:{re.escape(prefix)})?{re.escape(stack)}\.(\d+)\.")
        beyond: set[int] = set()
        for stored in self._files.names:
            name, merged = renamed(stored)
            if name not in state:
                self.unbuilt.append(stored)
                if (match := later.match(name)) and int(match[1]) >= len(blocks):
                    beyond.add(int(match[1]))
                    self.further.add(stored)
                continue
            if merged:
                self._merged[stored] = name
            else:
                self._places[stored] = name
                self._names[name] = stored
            owner = next((part for part in _prefixes(name) if part in self.of_block), None)
            group = self.of_block[owner] if owner else self.head if name in head else self.embeddings
            group.append(stored)
        config = self._model.config.get_text_config()
        if len(beyond) > max(int(getattr(config, key, 0) or 0) for key in FURTHER):
            raise BesaError(
                f"{self._source} holds {len(blocks) + len(beyond)} blocks, its config.json says {len(blocks)}: it is "
                "damaged, or belongs to another checkpoint."
            )

    def _check(self) -> None:
        """Check from the headers alone that no weight is missing, and that besa can compute with every weight."""
        state, stored_whole = self._model.state_dict(), {*self._places.values()}
        merged: Counter[str] = Counter()  # number of stored elements of each weight that is merged from several tensors
        for stored, shape in self._files.shapes():
            if stored in self._merged:
                merged[self._merged[stored]] += math.prod(shape)
            elif stored in self._places and shape != tuple(state[self._places[stored]].shape):
                refuse_shape(self._source, self._places[stored], shape, state[self._places[stored]].shape)
        for stored in [*self._places, *self._merged]:
            place = state.get(self._places.get(stored, ""))
            dtype = self._dtypes.get(stored, "F32")  # packed tensors are checked elsewhere
            if dtype not in FLOATS and (place is None or place.is_floating_point()):
                raise BesaError(
                    f"{self._source} stores {stored} as {dtype}, which besa does not compute in: take the checkpoint "
                    "in bfloat16, float16 or float32."
                )
        tied: dict[str, set[str]] = {}  # of tied weights, the files need one name only, as for transformers
        for target, origin in self._model.all_tied_weights_keys.items():
            tied.setdefault(origin, {origin}).add(target)
        for name in self._parameters:
            if 0 < merged[name] < state[name].numel():
                raise BesaError(f"{self._source} lacks a part of the weight {name}: the checkpoint is incomplete.")
            equivalent = next((names for names in tied.values() if name in names), {name})
            if not equivalent & (stored_whole | merged.keys()):
                raise BesaError(f"{self._source} lacks the weight {name}: {self._why_lacking()}.")

    def _why_lacking(self) -> str:
        """What a weight that no file seems to hold means; some families store several weights in one tensor."""
        if any(isinstance(entry, WeightConverter) and len(entry.target_patterns) > 1 for entry in self._conversions):
            return (
                "the checkpoint is incomplete, or has several weights in one tensor, which besa cannot read from "
                "files: if so, load the model whole and give it to besa.compress"
            )
        return "the checkpoint is incomplete"

    def check_way_back(self) -> None:
        """Check that tensors which the model merges can be separated again for the files.

        Raises:
            BesaError: they cannot, so that the model could be pruned but not written.
        """
        for block in self._blocks:
            merged = self._merged.keys() & self.of_block[block.name]
            with quiet(), model_explained(self._source):
                missing = merged.difference(self._reverted(_state(block)) if merged else ())
            if missing:
                raise BesaError(
                    f"{self._source}: {min(missing)} is merged with other weights in transformers and could not be "
                    "written back: save the model once with transformers' save_pretrained, and prune that."
                )

    def place(self, stored: str) -> tuple[str, bool]:
        """The name in the model of a stored tensor ("" for an unbuilt one), and whether it is merged with others."""
        if stored in self._merged:
            return self._merged[stored], True
        return self._places.get(stored, ""), False

    def name_in_files(self, name: str) -> str:
        """The name in the files of a plain linear of the model."""
        return self._names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")

    @property
    def unbuilt_bytes(self) -> int:
        """Size of the tensors that the model has no module for."""
        return sum(tensor.nbytes for _, tensor in self._files.mapped(self.unbuilt))

    def read(self, names: list[str], device: torch.device) -> dict[str, Tensor]:
        """Read tensors from the files to a device.

        Args:
            names: of the tensors in the files.
            device: where they are needed.

        Raises:
            BesaError: a tensor is damaged, not finite, or too large for the dtype of the model.
        """
        tensors = self._files.read_to([name for name in names if self._is_weight(name)], device)
        dtype = self._model.dtype
        rounded = {name: tensor.to(dtype) for name, tensor in tensors.items() if tensor.dtype != dtype}
        if (name := not_finite(rounded)) is not None:
            raise _too_large(name, dtype)
        others = self._files.mapped([name for name in names if not self._is_weight(name)])
        return tensors | {name: tensor.to(device) for name, tensor in others}

    def _tensors(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the files. Buffers may hold infinity, as bounds do, but weights may not."""
        yield from self._files.read([name for name in names if self._is_weight(name)])
        yield from self._files.mapped([name for name in names if not self._is_weight(name)])

    def _is_weight(self, stored: str) -> bool:
        """Whether a stored tensor is a parameter of the model, or is merged into one."""
        return stored in self._merged or self._places[stored] in self._parameters

    def load_tensors(self, model: PreTrainedModel, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Load tensors, by their names in the files, into a model with the same modules; see `load_tensors`."""
        load_tensors(model, tensors, self._conversions, self._source, device)

    def stored(self, block: Block, rounded: bool) -> dict[str, Tensor]:
        """The tensors of an open block on the CPU, with the names and layout of the files.

        Args:
            block: with its weights, pruned or not.
            rounded: convert parameters to the dtype of the model. Otherwise every tensor keeps its dtype in the files,
                and every number that did not change keeps its bits.
        """
        state = at_home(_state(block))
        names = self.of_block[block.name]
        merged = self._reverted(state) if self._merged.keys() & names else {}
        places = {stored: self._places.get(stored) for stored in names}
        tensors = {stored: merged[stored] if place is None else state[place] for stored, place in places.items()}
        return self._as_in_files(tensors, rounded)

    def stored_outside(self, state: Mapping[str, Tensor], rounded: bool) -> dict[str, Tensor]:
        """Parameters outside the blocks with their names and dtypes in the files.

        Args:
            state: on the CPU, by their names in the model.
            rounded: as for `stored`.
        """
        return self._as_in_files({self._names[name]: tensor for name, tensor in state.items()}, rounded)

    def _as_in_files(self, tensors: dict[str, Tensor], rounded: bool) -> dict[str, Tensor]:
        """The tensors, by their names in the files, in the dtypes of the files."""
        other: list[str] = []  # names of tensors that have another dtype in the files
        for stored, tensor in tensors.items():
            converted = rounded and self._is_weight(stored)
            if not converted and FLOATS.get(self._dtypes[stored]) not in (None, tensor.dtype):
                other.append(stored)
        return tensors | {stored: _in_dtype_of(old, tensors[stored]) for stored, old in self._files.read(other)}

    def tensors_outside_blocks(self, rounded: bool) -> Iterator[tuple[str, Tensor]]:
        """The stored tensors that belong to no block, one by one, bit-equal unless they are `rounded`.

        Args:
            rounded: as for `stored`; tensors that the model has no module for are never rounded.
        """
        plan = list(self._model._get_dtype_plan(self._model.dtype))  # these stay in float32 whatever the model's dtype
        exact = build_glob_alternation(plan)[0] if plan else None
        for name, tensor in self._tensors([*self.embeddings, *self.head]):
            cast = rounded and self._is_weight(name) and not (exact and exact.search(self._places.get(name, "")))
            yield name, in_dtype(name, tensor, self._model.dtype) if cast else tensor
        yield from self._files.mapped(self.unbuilt)

    def _reverted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a block as in the files, for tensors that are merged in the model."""
        self._model._weight_conversions = [entry for entry in self._conversions if entry.was_used()]
        tensors: dict[str, Tensor] = revert_weight_conversion(self._model, state)
        return tensors


def renaming(model: PreTrainedModel, conversions: list[WeightTransform]) -> Callable[[str], tuple[str, bool]]:
    """A function from a name in the files to the name in the model, and whether the tensor is merged with others."""
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state = model.state_dict()

    def renamed(stored: str) -> tuple[str, bool]:
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        if name not in state and stored in state:  # a pattern matched too much; transformers undoes it too
            name, pattern = rename_source_key(stored, [], [], model.base_model_prefix, state)
        return name, pattern is not None

    return renamed


def load_tensors(
    model: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    conversions: list[WeightTransform],
    source: str,
    device: torch.device = CPU,
) -> None:
    """Load tensors, by their names in the files, into the model's parameters, in the dtype of the model.

    Args:
        model: whose parameters of these names are replaced.
        tensors: anywhere.
        conversions: from the files to the model.
        source: name of the checkpoint, for error messages.
        device: where the parameters will be.

    Raises:
        BesaError: a tensor has another shape than the parameter, or cannot be converted.
    """
    config = LoadStateDictConfig(
        dtype=model.dtype,
        dtype_plan=model._get_dtype_plan(model.dtype),
        weight_mapping=conversions,
        device_map={"": device},
    )
    with quiet(), model_explained(source):
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
    for name, stored, expected in info.mismatched_keys:
        refuse_shape(source, name, stored, expected)
    for name, reason in info.conversion_errors.items():
        raise BesaError(f"{source}: the weight {name} cannot be read: {' '.join(reason.split())[:200]}.")
    model.requires_grad_(False)


def tie(model: PreTrainedModel) -> None:
    """Share tied weights, whichever of their names is in the files. Two different stored tensors stay separate."""
    absent = {name for name, weight in model.named_parameters(remove_duplicate=False) if weight.is_meta}
    with quiet():
        model.tie_weights(missing_keys=absent, recompute_mapping=False)


def in_files(model: PreTrainedModel, block: Block) -> dict[str, Tensor]:
    """The tensors of a block of a model in memory, with the names and layout in which transformers would save them."""
    tensors: dict[str, Tensor] = revert_weight_conversion(model, _state(block))
    return tensors


def in_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor `name` in another floating-point format.

    Raises:
        BesaError: a number is too large for it.
    """
    rounded = tensor.to(dtype)
    if not is_finite(rounded):
        raise _too_large(name, dtype)
    return rounded


def _too_large(name: str, dtype: torch.dtype) -> BesaError:
    return BesaError(f"{name} holds numbers too large for {dtype_name(dtype)}: choose bfloat16 or float32.")


def refuse_shape(source: str, name: str, stored: Iterable[int], expected: Iterable[int]) -> NoReturn:
    """Refuse a weight whose stored shape is not the one that the configuration gives.

    Raises:
        BesaError: always.
    """
    raise BesaError(
        f"{source}: the weight {name} is {tuple(stored)}, its config.json says {tuple(expected)}: "
        "it is damaged, or belongs to another checkpoint."
    )


def _in_dtype_of(old: Tensor, new: Tensor) -> Tensor:
    """The tensor `new` in the dtype of `old`, with the bits of `old` where the number is the same.

    If a changed number is too small or too large for that dtype, the tensor keeps its own dtype.
    """
    rounded = new.to(old.dtype)
    if bool(((rounded == 0) != (new == 0)).any()) or not bool(rounded.isfinite().all()):
        return new
    return torch.where(new == old.to(new.dtype), old, rounded) if new.shape == old.shape else rounded


def _state(block: Block) -> dict[str, Tensor]:
    """The tensors of a block by their names in the model."""
    return {f"{block.name}.{name}": tensor for name, tensor in block.module.state_dict().items()}


def _prefixes(name: str) -> Iterator[str]:
    """a, a.b, … of a.b.c."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))
