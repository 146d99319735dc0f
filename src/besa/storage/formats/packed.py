"""``pack-quantized`` of compressed-tensors: codes packed into int32, which transformers and vLLM load as they are.

Pruned weights have the code of zero, so zeros survive exactly; no mask is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor, nn

from besa.errors import BesaError
from besa.quantization import Grid, MinMax, Quantized
from besa.storage.formats.bitmask import FLOATS, is_positive

FORMAT = "pack-quantized"
KEYS = WEIGHT, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"


def check(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse beforehand what transformers would not load packed.

    Args:
        model: whose weights may be on the meta device.
        names: full names of the linears to be packed.

    Raises:
        BesaError: one is no plain linear, but a transposed one, a family's own, or an expert of a fused stack.
    """
    modules = dict(model.named_modules())
    for name in names:
        if type(modules.get(name)) is not nn.Linear:
            raise BesaError(
                f"{name} is no plain linear, and could not be loaded packed: use --dequantized, or leave it out "
                "with --skip."
            )


def pack(tensors: Mapping[str, Tensor], quantized: Mapping[str, Quantized]) -> dict[str, Tensor]:
    """The tensors of a block with its quantised weights packed.

    Args:
        tensors: named as in the checkpoint's files.
        quantized: by name of the linear in the files.

    Raises:
        BesaError: a quantised weight is no tensor of its own in the files (as a fused stack of experts).
    """
    packed = dict(tensors)
    for name, weight in quantized.items():
        stored = packed.pop(f"{name}.weight", None)
        if stored is None or stored.shape != weight.codes_OI.shape:
            raise BesaError(f"{name} cannot be packed, as its file does not hold it as a linear: use --dequantized.")
        rows, groups = weight.grid.step_OG.shape
        if groups > 1 and rows * weight.grid.bits <= 32:  # one word of zero points: compressed-tensors cannot read it
            raise BesaError(f"{name} has only {rows} rows, too few to be packed in groups: use --dequantized.")
        packed |= {f"{name}.{key}": tensor for key, tensor in tensors_of(weight).items()}
    return packed


def tensors_of(weight: Quantized) -> dict[str, Tensor]:
    """The tensors of one linear by the last part of their names."""
    half = 2 ** (weight.grid.bits - 1)  # codes are signed there
    tensors = {
        WEIGHT: pack_to_int32((weight.codes_OI.to(torch.int16) - half).to(torch.int8).cpu(), weight.grid.bits),
        SCALE: weight.grid.step_OG.to(weight.dtype).detach().cpu(),
        SHAPE: torch.tensor(weight.codes_OI.shape),
    }
    if not weight.symmetric:
        zeros_OG = (weight.grid.zero_OG - half).to(torch.int8).detach().cpu()
        tensors[ZERO] = pack_to_int32(zeros_OG, weight.grid.bits, packed_dim=0)
    return tensors


def unpack(tensors: Mapping[str, Tensor], quantization: MinMax) -> dict[str, Tensor]:
    """The dense tensors that `pack` packed, to the bit."""
    dense = {name: tensor for name, tensor in tensors.items() if not name.endswith(KEYS)}
    for linear in linears(tensors):
        stored = of_linear(tensors, linear)
        dense[f"{linear}.weight"] = PackedQuantizationCompressor.decompress(stored, _scheme(quantization))["weight"]
    return dense


def quantized(own: Mapping[str, Tensor], bits: int) -> Quantized:
    """The codes and their grid, to the bit as `tensors_of` packed them.

    Args:
        own: the tensors of one linear by the last part of their names.
        bits: of a code.
    """
    half = 2 ** (bits - 1)
    rows, columns = own[SHAPE].tolist()
    codes_OI = unpack_from_int32(own[WEIGHT], bits, torch.Size([rows, columns])).to(torch.int16) + half
    step_OG = own[SCALE].float()
    zero_OG = torch.full_like(step_OG, half)
    if ZERO in own:
        zero_OG += unpack_from_int32(own[ZERO], bits, torch.Size(step_OG.shape), packed_dim=0)
    return Quantized(codes_OI.to(torch.uint8), Grid(step_OG, zero_OG, bits), ZERO not in own, own[SCALE].dtype)


def linears(names: Iterable[str]) -> list[str]:
    """The linears whose weights are stored as codes, by the names of all tensors."""
    return [name.removesuffix(f".{WEIGHT}") for name in names if name.endswith(f".{WEIGHT}")]


def of_linear(tensors: Mapping[str, Tensor], linear: str) -> dict[str, Tensor]:
    """The tensors of one linear by the last part of their names."""
    return {key: tensors[f"{linear}.{key}"] for key in KEYS if f"{linear}.{key}" in tensors}


def check_codes(own: Mapping[str, Tensor], bits: int, name: str) -> None:
    """Refuse tensors of a linear that do not fit each other, or scales that are none; arguments as in `quantized`.

    Args:
        own: the tensors of one linear by the last part of their names.
        bits: of a code.
        name: of the linear, for the message.

    Raises:
        BesaError: so they are.
    """
    flaw = ""
    if missing := [key for key in (WEIGHT, SCALE, SHAPE) if key not in own]:
        flaw = f"it has no {missing[0]}"
    elif own[SHAPE].shape != (2,) or own[SHAPE].dtype not in (torch.int64, torch.int32) or int(own[SHAPE].min()) < 1:
        flaw = f"its {SHAPE} holds no shape"
    elif not _fits(own, bits):
        flaw = "its codes, scales and zero points do not fit"
    elif not is_positive(own[SCALE]):
        flaw = "its scales are not all positive numbers"
    if flaw:
        raise BesaError(f"The quantised weight {name} is damaged: {flaw}; get or make the checkpoint anew.")


def _fits(own: Mapping[str, Tensor], bits: int) -> bool:
    rows, columns = own[SHAPE].tolist()
    groups = own[SCALE].shape[-1] if own[SCALE].dim() else 0
    if groups == 0 or columns % groups:
        return False
    shapes = {WEIGHT: (rows, -(-columns * bits // 32)), SCALE: (rows, groups), ZERO: (-(-rows * bits // 32), groups)}
    kinds = {WEIGHT: (torch.int32,), SCALE: FLOATS, ZERO: (torch.int32,)}
    return all(own[key].shape == shapes[key] and own[key].dtype in kinds[key] for key in own if key in kinds)


def is_zero(own: Mapping[str, Tensor], bits: int) -> Tensor:
    """Where a packed weight is zero (O, I), boolean; arguments as in `quantized`."""
    weight = quantized(own, bits)
    zero_OG = weight.grid.zero_OG.to(torch.uint8)
    return torch.eq(weight.codes_OI, zero_OG.repeat_interleave(weight.codes_OI.shape[1] // zero_OG.shape[1], dim=1))


def bits_of(config: Mapping[str, Any], source: str) -> int:
    """Bits of a code, by the quantization_config of the model `source`.

    Raises:
        BesaError: it is quantised in another format, or bits differ between its linears.
    """
    if not isinstance(config, Mapping) or config.get("format") != FORMAT:
        raise BesaError(f"{source} is quantised in a format that besa does not read: only {FORMAT} is.")
    try:
        (bits,) = {int(group["weights"]["num_bits"]) for group in config["config_groups"].values()}
        if bits not in range(2, 9):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BesaError(f"{source} does not say how many bits its codes have: config.json is damaged.") from None
    return bits


def bytes_of(own: Mapping[str, Tensor]) -> dict[str, int]:
    """What the tensors of one linear take, by what they are for."""
    names = {WEIGHT: "values", SCALE: "scales", ZERO: "zero points", SHAPE: "shapes"}
    return {names[key]: tensor.nbytes for key, tensor in own.items()}


def _scheme(quantization: MinMax) -> QuantizationScheme:
    grouped = {"strategy": "group", "group_size": quantization.group} if quantization.group else {"strategy": "channel"}
    arguments = QuantizationArgs(num_bits=quantization.bits, type="int", symmetric=quantization.symmetric, **grouped)
    return QuantizationScheme(targets=["Linear"], weights=arguments)


def quantization_config(quantization: MinMax, ignored: Iterable[str]) -> dict[str, Any]:
    """What config.json says of it, for whoever loads the model.

    Args:
        quantization: of all linears but those ignored.
        ignored: names of linears that are stored dense.
    """
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": _scheme(quantization).model_dump(mode="json")},
        "ignore": list(ignored),
    }
