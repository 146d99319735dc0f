"""A packed checkpoint as transformers sees it: `from_pretrained` builds sparse layers by this quantiser.

It is imported in the middle of transformers' own import, so nothing that needs a model of transformers is imported
before a model is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from besa.errors import BesaError
from besa.storage.weights import INDEX, PACKED, SPARSE_STEM


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a packed checkpoint.

    Args:
        format: see `besa.storage.formats.container.settings`, as for the others.
        version: of the format.
        sharded: whether the weights are in several files.
        codes: settings of the quantiser that made the codes.
        others: not used.
    """

    def __init__(
        self,
        format: str | None = None,
        version: int | None = None,
        sharded: bool = False,
        codes: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        self.quant_method = PACKED
        self.format = format
        self.version = version
        self.sharded = sharded
        self.codes = codes


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads a packed checkpoint with sparse layers, for inference."""

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = False  # else transformers leaves dense weights in the dtype of their file

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the weight file; transformers calls it before it looks for one."""
        config.transformers_weights = f"{SPARSE_STEM}{INDEX if self.quantization_config.sharded else '.safetensors'}"
        return config

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str] | None, **_: Any) -> None:
        from besa.runtime.packed import lay_out

        if not checkpoint_files:
            raise BesaError("Packed weights are read from files: give `from_pretrained` the folder, no `state_dict`.")
        del model.config.transformers_weights  # in a saved config.json it would lead programs without besa to the file
        self._packed = lay_out(model, [Path(file) for file in checkpoint_files])

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from besa.runtime.packed import finish

        return finish(model, self.__dict__.pop("_packed"))  # which a copy of the model would copy

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        from besa.runtime.packed import make_dense

        named = isinstance(dtype, str)  # as `save_pretrained` leaves the dtype in a model's configuration
        return make_dense(model, getattr(torch, dtype) if named else dtype)

    def is_serializable(self) -> bool:
        """`save_pretrained` writes a packed checkpoint."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Sparse layers compute no gradients."""
        return False


if PACKED not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(PACKED)(PackedConfig)
    register_quantizer(PACKED)(PackedQuantizer)
