"""A checkpoint whose blocks have widths of their own, as transformers sees it: a quantiser narrows the model.

Nothing is quantised. A quantiser is what transformers asks before it loads weights. As in `integrations.quantizer`,
nothing that needs a model of transformers is imported before a model is loaded.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from besa.storage.weights import INDEX, WIDTHS, WIDTHS_STEM


class WidthsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of such a checkpoint.

    Args:
        version: of the format.
        sharded: whether the weights are in several files.
        widths: structures of every block, by kind.
    """

    def __init__(self, version: int | None = None, sharded: bool = False, **widths: Any) -> None:
        self.quant_method = WIDTHS
        self.version = version
        self.sharded = sharded
        for kind, numbers in widths.items():
            setattr(self, kind, numbers)


class WidthsQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads such a checkpoint as an ordinary model with narrower linears, to run and to train."""

    def __init__(self, quantization_config: WidthsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = False  # else transformers leaves dense weights in the dtype of their file

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the weight file; transformers calls it before it looks for one."""
        config.transformers_weights = f"{WIDTHS_STEM}{INDEX if self.quantization_config.sharded else '.safetensors'}"
        return config

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        from besa.models.widths import narrow, widths_of

        narrow(model, widths_of(model.config))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from besa.runtime.narrow import finish

        return finish(model)

    def is_serializable(self) -> bool:
        """`save_pretrained` writes such a checkpoint again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Its linears are ordinary ones."""
        return True


if WIDTHS not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(WIDTHS)(WidthsConfig)
    register_quantizer(WIDTHS)(WidthsQuantizer)
