"""The checks of a packed checkpoint, before it is run, unpacked, counted or packed further."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from besa.counting.precision import dtype_name
from besa.errors import BesaError
from besa.models.finding import find_blocks
from besa.models.layout import Layout
from besa.models.loading import is_quantized, quantization_of, skeleton
from besa.models.source import Source
from besa.storage.formats import codes
from besa.storage.formats.container import AsDense, Container, codes_said
from besa.storage.weights import WeightFiles, is_finite


def check_packed(files: WeightFiles) -> None:
    """Read a packed checkpoint once, and refuse invalid contents.

    Masks, values, codes, scales and zero points must fit each other and be in range, and config.json must say whether
    there are zero points. All scales must have one dtype. No weight or bias may hold NaN or infinity; buffers may hold
    infinity, as masks do. Nothing is read of a checkpoint that is not packed.

    Args:
        files: of a checkpoint with bitmasks, codes or both.

    Raises:
        BesaError: a tensor is invalid; the message has its name.
    """
    sparse = dict(files.weights()) if isinstance(files, Container) else {}
    matrices = dict(files.matrices()) if isinstance(files, Container) else {}
    names = files.dense if isinstance(files, Container) else files.names
    coded = codes.linears(names)
    if not sparse and not coded and not matrices:
        return
    said, source = codes_said(files.folder), str(files.folder)
    bits = codes.bits_of(said, source) if said else None
    symmetric = codes.symmetric_of(said, source) if said else None
    scales: dict[str, torch.dtype] = {}
    for linear, weight in sparse.items():
        weight.check(linear)
        if weight.scales_OG is not None:
            _check_zero_points(linear, weight.zeros_OG is not None, symmetric)
            scales[linear] = weight.scales_OG.dtype
    for name, matrix in matrices.items():
        matrix.check(name)
        scales[name] = matrix.dtype
    tensors = dict(files.mapped(names))
    for linear in coded:
        if bits is None:
            raise BesaError(
                f"{files.folder} holds codes for {linear}, but its config.json has no quantization_config: "
                "the checkpoint is damaged."
            )
        of_linear = codes.of_linear(tensors, linear)
        codes.check_codes(of_linear, bits, linear)
        _check_zero_points(linear, codes.ZERO in of_linear, symmetric)
        scales[linear] = of_linear[codes.SCALE].dtype
    for linear, dtype in scales.items():
        usual = next(iter(scales.values()))
        if dtype != usual:
            raise BesaError(
                f"The scales of {linear} are {dtype_name(dtype)}, others of {files.folder} {dtype_name(usual)}: the "
                "checkpoint is damaged; get or make it anew."
            )
    for name, tensor in tensors.items():
        if name.endswith((".weight", ".bias")) and not is_finite(tensor):
            raise BesaError(f"The tensor {name} of {files.folder} holds NaN or infinity: the checkpoint is damaged.")


def _check_zero_points(name: str, has: bool, symmetric: bool | None) -> None:
    """Check that a linear has zero points if, and only if, config.json says so.

    Args:
        name: of the linear.
        has: whether it has zero points.
        symmetric: as of `codes.symmetric_of`.

    Raises:
        BesaError: it has none and needs some, or the other way round.
    """
    if has is symmetric:
        flaw = "it has a weight_zero_point, though config.json says symmetric" if has else "it has no weight_zero_point"
        raise BesaError(f"The quantised weight {name} is damaged: {flaw}; get or make the checkpoint anew.")


def check_complete(source: Source, files: WeightFiles, config: PreTrainedConfig) -> PreTrainedModel:
    """Check from the headers that a checkpoint has every weight of its model in the right shape, and no further block.

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
    check_layout(source.name, files, empty)
    return empty


def check_layout(name: str, files: WeightFiles, model: PreTrainedModel) -> None:
    """Check as `check_complete` does, against a model that exists already.

    Args:
        name: of the checkpoint, for error messages.
        files: as of `check_complete`.
        model: on the meta device, buffers too.

    Raises:
        BesaError: as `check_complete`.
    """
    Layout(name, AsDense(files), model, find_blocks(model))
