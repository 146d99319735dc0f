"""Models of random weights of any family, half of them zero."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

TINY = Path(__file__).parent / "assets" / "tiny-llama"


def halved(config: PretrainedConfig, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random model with half of each matrix zero, and the tokenizer of the tiny Llama."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data[torch.rand_like(parameter) < 0.5] = 0
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    return folder
