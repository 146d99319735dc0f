"""Codes in the ``pack-quantized`` format of compressed-tensors, which transformers and vLLM load as it is.

Several codes share one int32. A pruned weight has the code of zero, so zeros stay exact and no mask is stored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor, nn

from besa.errors import BesaError
from besa.quantization import Coding, Grid, Quantized
from besa.storage.formats.bitmask import FLOATS, is_positive

FORMAT = "pack-quantized"
INITIALISE = "_init_weights"  # of a model of transformers, called with each module that it loads
KEYS = WEIGHT, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"


def check(model: nn.Module, names: Collection[str]) -> None:
    """Check that transformers can load these linears as codes.

    Args:
        model: may be on the meta device.
        names: full names of the linears to be stored as codes.

    Raises:
        BesaError: a linear is no `nn.Linear`, but a transposed one, a family's own, or an expert of a fused stack; or
            the family initialises weights in a way that fails for codes.
    """
    modules = dict(model.named_modules())
    for name in names:
        if type(modules.get(name)) is not nn.Linear:
            raise BesaError(
                f"{name} is no plain linear and cannot be loaded as codes: use --dequantized, or leave it out "
                "with --skip."
            )
    tried: set[type[nn.Module]] = set()
    for name in names:
        for path in _above(name, modules):
            if type(modules[path]) not in tried:
                tried.add(type(modules[path]))
                _check_initialised(path, modules, [own for own in names if own.startswith(f"{path}.")])


def _above(name: str, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The modules that a linear is in, up to the one whose `_init_weights` initialises them; no lists."""
    while (name := name.rpartition(".")[0]) and not hasattr(modules[name], INITIALISE):
        if not isinstance(modules[name], nn.ModuleList):
            yield name


def _check_initialised(path: str, modules: Mapping[str, nn.Module], names: Iterable[str]) -> None:
    """Check that what transformers initialises in a module, whatever its file holds, is no weight of these linears.

    Raises:
        BesaError: it is.
    """
    owner = path
    while owner and not hasattr(modules[owner], INITIALISE):
        owner = owner.rpartition(".")[0]
    initialise = getattr(modules[owner], INITIALISE, None)
    if initialise is None:
        return
    known = {id(tensor): nn.Parameter(tensor.to("meta"), False) for tensor in modules[path].parameters()}
    copy = deepcopy(modules[path], known)  # whose parameters hold no numbers
    for name in names:
        del copy.get_submodule(name.removeprefix(f"{path}.")).weight
    try:
        initialise(copy)
    except AttributeError:
        kind = type(modules[path]).__name__
        raise BesaError(
            f"{path} cannot be loaded as codes: transformers initialises weights of each {kind}, which codes are not; "
            "use --dequantized."
        ) from None


def encode(tensors: Mapping[str, Tensor], quantized: Mapping[str, Quantized]) -> dict[str, Tensor]:
    """The tensors of a block with its quantised weights as codes.

    Args:
        tensors: named as in the checkpoint's files.
        quantized: by name of the linear in the files.

    Raises:
        BesaError: a quantised weight has no tensor of its own in the files (a fused stack of experts), or a linear has
            too few rows for codes in groups.
    """
    coded = dict(tensors)
    for name, weight in quantized.items():
        stored = coded.pop(f"{name}.weight", None)
        if stored is None or stored.shape != weight.codes_OI.shape:
            raise BesaError(
                f"{name} cannot be stored as codes because its file does not hold it as a linear: use --dequantized."
            )
        rows, groups = weight.grid.step_OG.shape
        if groups > 1 and rows * weight.grid.bits <= 32:  # compressed-tensors cannot read a single word of zero points
            raise BesaError(f"{name} has only {rows} rows, too few for codes in groups: use --dequantized.")
        coded |= {f"{name}.{key}": tensor for key, tensor in tensors_of(weight).items()}
    return coded


def tensors_of(weight: Quantized) -> dict[str, Tensor]:
    """The tensors of one linear by the last part of their names."""
    half = 2 ** (weight.grid.bits - 1)  # compressed-tensors has signed codes
    tensors = {
        WEIGHT: pack_to_int32((weight.codes_OI.to(torch.int16) - half).to(torch.int8).cpu(), weight.grid.bits),
        SCALE: weight.grid.step_OG.to(weight.dtype).detach().cpu(),
        SHAPE: torch.tensor(weight.codes_OI.shape),
    }
    if not weight.symmetric:
        zeros_OG = (weight.grid.zero_OG - half).to(torch.int8).detach().cpu()
        tensors[ZERO] = pack_to_int32(zeros_OG, weight.grid.bits, packed_dim=0)
    return tensors


def decode(tensors: Mapping[str, Tensor], quantization: Coding) -> dict[str, Tensor]:
    """The dense tensors of a block from what `encode` returned, to the bit."""
    dense = {name: tensor for name, tensor in tensors.items() if not name.endswith(KEYS)}
    for linear in linears(tensors):
        stored = of_linear(tensors, linear)
        dense[f"{linear}.weight"] = PackedQuantizationCompressor.decompress(stored, _scheme(quantization))["weight"]
    return dense


def quantized(tensors: Mapping[str, Tensor], bits: int) -> Quantized:
    """The codes and their grid from what `tensors_of` returned, to the bit.

    Args:
        tensors: of one linear, by the last part of their names.
        bits: of a code.
    """
    half = 2 ** (bits - 1)
    rows, columns = tensors[SHAPE].tolist()
    codes_OI = unpack_from_int32(tensors[WEIGHT], bits, torch.Size([rows, columns])).to(torch.int16) + half
    step_OG = tensors[SCALE].float()
    zero_OG = torch.full_like(step_OG, half)
    symmetric = ZERO not in tensors
    if not symmetric:
        zero_OG += unpack_from_int32(tensors[ZERO], bits, torch.Size(step_OG.shape), packed_dim=0)
    return Quantized(codes_OI.to(torch.uint8), Grid(step_OG, zero_OG, bits), symmetric, tensors[SCALE].dtype)


def linears(names: Iterable[str]) -> list[str]:
    """The linears whose weights are stored as codes, by the names of all tensors."""
    return [name.removesuffix(f".{WEIGHT}") for name in names if name.endswith(f".{WEIGHT}")]


def of_linear(tensors: Mapping[str, Tensor], linear: str) -> dict[str, Tensor]:
    """The tensors of one linear by the last part of their names."""
    return {key: tensors[f"{linear}.{key}"] for key in KEYS if f"{linear}.{key}" in tensors}


def check_codes(tensors: Mapping[str, Tensor], bits: int, name: str) -> None:
    """Check that the tensors of a linear fit each other and that its scales are positive.

    Args:
        tensors: of one linear, by the last part of their names.
        bits: of a code.
        name: of the linear, for the message.

    Raises:
        BesaError: a tensor is missing, has the wrong shape or dtype, or a scale is no positive number.
    """
    flaw = ""
    if missing := [key for key in (WEIGHT, SCALE, SHAPE) if key not in tensors]:
        flaw = f"it has no {missing[0]}"
    elif not _is_shape(tensors[SHAPE]):
        flaw = f"its {SHAPE} holds no shape"
    elif not _fits(tensors, bits):
        flaw = "its codes, scales and zero points do not fit"
    elif not is_positive(tensors[SCALE]):
        flaw = "its scales are not all positive numbers"
    if flaw:
        raise BesaError(f"The quantised weight {name} is damaged: {flaw}; get or make the checkpoint anew.")


def _is_shape(shape: Tensor) -> bool:
    return shape.shape == (2,) and shape.dtype in (torch.int64, torch.int32) and int(shape.min()) >= 1


def _fits(tensors: Mapping[str, Tensor], bits: int) -> bool:
    rows, columns = tensors[SHAPE].tolist()
    groups = tensors[SCALE].shape[-1] if tensors[SCALE].dim() else 0
    if groups == 0 or columns % groups:
        return False
    shapes = {WEIGHT: (rows, -(-columns * bits // 32)), SCALE: (rows, groups), ZERO: (-(-rows * bits // 32), groups)}
    kinds = {WEIGHT: (torch.int32,), SCALE: FLOATS, ZERO: (torch.int32,)}
    stored = {key: tensor for key, tensor in tensors.items() if key in kinds}
    return all(tensor.shape == shapes[key] and tensor.dtype in kinds[key] for key, tensor in stored.items())


def is_zero(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """Where the weight of a linear is zero: (O, I), boolean; arguments as in `quantized`."""
    weight = quantized(tensors, bits)
    return torch.eq(weight.codes_OI, weight.zeros_OI())


def bits_of(config: Mapping[str, Any], source: str) -> int:
    """Bits of a code, from the quantization_config of the model `source`.

    Raises:
        BesaError: the model is quantised in another format, or its linears differ in bits.
    """
    if not isinstance(config, Mapping) or config.get("format") != FORMAT:
        raise BesaError(f"{source} is quantised in a format that besa does not read: only {FORMAT} is.")
    try:
        (bits,) = {int(group["weights"]["num_bits"]) for group in config["config_groups"].values()}
        if bits not in range(2, 9):
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        raise BesaError(f"{source} does not say how many bits its codes have: config.json is damaged.") from None
    return bits


def symmetric_of(config: Mapping[str, Any], source: str) -> bool | None:
    """Whether codes have no zero points, from the quantization_config of the model `source`.

    Args:
        config: of which `bits_of` has read the bits.
        source: for the message.

    Returns:
        None if its linears differ in that.

    Raises:
        BesaError: it is neither true nor false.
    """
    said = [group["weights"].get("symmetric", True) for group in config["config_groups"].values()]  # as in their reader
    if not all(isinstance(symmetric, bool) for symmetric in said):
        raise BesaError(f"{source} does not say whether its codes are symmetric: config.json is damaged.")
    return said[0] if len({*said}) == 1 else None


def bytes_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of the tensors of one linear, by purpose."""
    names = {WEIGHT: "values", SCALE: "scales", ZERO: "zero points", SHAPE: "shapes"}
    return {names[key]: tensor.nbytes for key, tensor in tensors.items()}


def _scheme(quantization: Coding) -> QuantizationScheme:
    grouped = {"strategy": "group", "group_size": quantization.group} if quantization.group else {"strategy": "channel"}
    arguments = QuantizationArgs(num_bits=quantization.bits, type="int", symmetric=quantization.symmetric, **grouped)
    return QuantizationScheme(targets=["Linear"], weights=arguments)


def quantization_config(quantization: Coding, ignored: Iterable[str]) -> dict[str, Any]:
    """The quantization_config of config.json, for programs that load the model.

    Args:
        quantization: settings of all linears except those ignored.
        ignored: names of linears that are stored dense.
    """
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": _scheme(quantization).model_dump(mode="json")},
        "ignore": list(ignored),
    }
