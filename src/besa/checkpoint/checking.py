"""The checks of a packed checkpoint, before it is run, unpacked, counted or packed further; one for all who open it."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from besa.errors import BesaError
from besa.models.blocks import find_blocks
from besa.models.layout import Layout
from besa.models.loading import Source, is_quantized, quantization_of, skeleton
from besa.storage.formats import codes
from besa.storage.formats.container import AsDense, Container, bits_in
from besa.storage.weights import WeightFiles, is_finite


def check_packed(files: WeightFiles) -> None:
    """Read a packed checkpoint once, where it lies, and refuse what nobody packs.

    Masks, values, codes, scales and zero points fit each other and are in range, all scales have one dtype, and no
    number of a weight or bias is NaN or infinite (buffers may hold infinity, as masks do). Of a checkpoint that is not
    packed, nothing is read.

    Args:
        files: of a checkpoint with bitmasks, codes or both.

    Raises:
        BesaError: a tensor is not so; its name is in the sentence.
    """
    sparse = dict(files.weights()) if isinstance(files, Container) else {}
    names = files.dense if isinstance(files, Container) else files.names
    coded = codes.linears(names)
    if not sparse and not coded:
        return
    scales: dict[str, torch.dtype] = {}
    for linear, weight in sparse.items():
        weight.check(linear)
        if weight.scales_OG is not None:
            scales[linear] = weight.scales_OG.dtype
    tensors, bits = dict(files.mapped(names)), bits_in(files)
    for linear in coded:
        if bits is None:
            raise BesaError(
                f"{files.folder} holds codes for {linear}, of which its config.json says nothing: it is damaged."
            )
        own = codes.of_linear(tensors, linear)
        codes.check_codes(own, bits, linear)
        scales[linear] = own[codes.SCALE].dtype
    for linear, dtype in scales.items():
        usual = next(iter(scales.values()))
        if dtype != usual:
            raise BesaError(
                f"The scales of {linear} are {_called(dtype)}, others of {files.folder} {_called(usual)}: the "
                "checkpoint is damaged; get or make it anew."
            )
    for name, tensor in tensors.items():
        if name.endswith((".weight", ".bias")) and not is_finite(tensor):
            raise BesaError(f"The tensor {name} of {files.folder} holds NaN or infinity: the checkpoint is damaged.")


def check_complete(source: Source, files: WeightFiles, config: PreTrainedConfig) -> PreTrainedModel:
    """Find out from the headers whether a checkpoint has each weight of its model, in its shape, and no block more.

    Args:
        source: a local folder.
        files: of the folder, packed or not, after `check_packed`.
        config: of the folder.

    Returns:
        The model, on the meta device.

    Raises:
        BesaError: it is incomplete, belongs to another configuration, or holds codes of another format.
    """
    if is_quantized(config):
        codes.bits_of(quantization_of(config), source.name)
    with torch.device("meta"):
        empty = skeleton(source, config)
    Layout(source.name, AsDense(files), empty, find_blocks(empty))
    return empty


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
