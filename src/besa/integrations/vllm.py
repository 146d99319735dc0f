"""Packed checkpoints in vLLM, which imports this by the entry point `vllm.general_plugins`; besa itself never does.

vLLM's own models are served with dense weights: each is unpacked while it is loaded, one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig, get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.model_loader import DefaultModelLoader, register_model_loader

from besa.checkpoint.checking import check_packed
from besa.errors import BesaError
from besa.models.source import Source
from besa.storage.formats.container import Container, open_files

NAME = "besa"  # of the load format, and of the method in config.json
EMPTY = "dummy"  # vLLM's load format that reads no weights


@cache
def register() -> None:
    """Make vLLM know packed checkpoints; it calls this in each of its processes."""
    register_quantization_config(NAME)(PackedConfig)
    register_model_loader(NAME)(PackedLoader)


class PackedLoader(DefaultModelLoader):  # type: ignore[misc]
    """The loader of ``--load-format besa``: the weights that were packed, one linear at a time, bit-equal.

    With tensor parallelism every process unpacks all weights and keeps its share.
    """

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self.enable_weights_track = True  # a parameter without a weight is an error, not random numbers

    def download_model(self, model_config: ModelConfig) -> None:
        """Fetch the files of a model of the Hub.

        Raises:
            BesaError: they cannot be fetched.
        """
        _folder(model_config)

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, as they were before packing.

        Raises:
            BesaError: the checkpoint is not packed or is damaged, or the model reads weights of another one too.
        """
        if getattr(model, "secondary_weights", ()):
            raise BesaError(f"{model_config.model} needs weights of a second checkpoint: `besa unpack` it for vLLM.")
        files = open_files(_folder(model_config))
        if not isinstance(files, Container):
            raise BesaError(f"{model_config.model} is not packed: leave out --load-format {NAME}.")
        if files.bits is not None and model_config.quantization is None:
            raise BesaError(f"{model_config.model} was packed by an older besa: unpack it with `besa unpack` for vLLM.")
        check_packed(files)
        self.counter_before_loading_weights = time.perf_counter()
        yield from files.read(files.names)


class PackedConfig(QuantizationConfig):  # type: ignore[misc]
    """What ``quantization_config`` of a packed checkpoint means: plain linears, or those of its codes."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """The configuration of vLLM's layers.

        Args:
            config: ``quantization_config`` of config.json.
        """
        return PackedCodesConfig.from_config(config["codes"]) if config.get("codes") else cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer computes: as in a dense checkpoint.

        Raises:
            BesaError: vLLM was started with another load format.
        """
        check_load_format()
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            return UnquantizedFusedMoEMethod(layer.moe_config)
        return None

    def get_name(self) -> str:
        """The method in config.json."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Formats of hidden states: all of vLLM."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Lowest compute capability of a GPU: any."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Further files with settings: none."""
        return []


class PackedCodesConfig(CompressedTensorsConfig):  # type: ignore[misc]
    """Codes that were packed: they reach vLLM as codes, and run on its own kernels."""

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer computes: as with the codes that were packed.

        Raises:
            BesaError: vLLM was started with another load format.
        """
        check_load_format()
        return super().get_quant_method(layer, prefix)


def check_load_format() -> None:
    """Refuse a loader that would look for dense weights.

    Raises:
        BesaError: vLLM was started with another load format.
    """
    load_format = get_current_vllm_config().load_config.load_format
    if load_format not in (NAME, EMPTY):
        raise BesaError(f"The checkpoint is packed: start vLLM with --load-format {NAME}, or `besa unpack` it.")


def _folder(model_config: ModelConfig) -> Path:
    """The folder of a model."""
    source = Source(model_config.model, model_config.model, revision=model_config.revision)
    folder = source.local().folder
    assert folder is not None
    return folder
