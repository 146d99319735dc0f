"""A run of llm-compressor, in its own environment: python -m benchmarks.peers.oneshot JOB."""

from __future__ import annotations

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from benchmarks.peers.measuring import Job, run

MODIFIERS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def prune(job: Job, tokens_NT: Tensor) -> None:
    """Prune all linears of all blocks, as llm-compressor's own examples do."""
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    sequences = [{"input_ids": row_T, "attention_mask": torch.ones_like(row_T)} for row_T in tokens_NT]
    oneshot(
        model=model,
        recipe=[MODIFIERS[job.method](targets=[r"re:.*layers\.\d+$"], **job.settings)],
        dataset=DataLoader(sequences, batch_size=job.batch),
        num_calibration_samples=len(sequences),
        max_seq_length=tokens_NT.shape[1],
        save_compressed=False,
        output_dir=job.out,
    )


if __name__ == "__main__":
    run(prune, ("llmcompressor", "compressed-tensors", "torch", "transformers"))
