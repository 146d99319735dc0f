"""Train a pruned model on, with its zeros kept.

python examples/finetune_with_masks.py MODEL TEXT TEST
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import besa


def main(model: str, text: str, test: str, seqlen: int = 512, steps: int = 200) -> tuple[float, float]:
    """Prune by Wanda, train on the same text; returns the perplexities before and after.

    Args:
        model: Hugging Face id, or a folder.
        text: file to calibrate and to train on.
        test: file to measure on.
        seqlen: tokens of a sequence and of a window.
        steps: of the optimiser.
    """
    besa.compress(model, "wanda", text, out="pruned", samples=16, seqlen=seqlen)
    tokenizer = AutoTokenizer.from_pretrained("pruned")
    pruned = AutoModelForCausalLM.from_pretrained("pruned")

    ids = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"]
    rows = torch.tensor(ids[: len(ids) // seqlen * seqlen]).view(-1, seqlen)
    arguments = TrainingArguments(
        "training",
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        report_to="none",
        save_steps=steps,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=pruned, args=arguments, train_dataset=data, callbacks=[besa.KeepMasks()])

    before = perplexity(pruned, tokenizer, test, seqlen)
    trainer.train()
    after = perplexity(pruned, tokenizer, test, seqlen)
    zeros = sum(int((each.weight == 0).sum()) for each in pruned.model.layers.modules() if hasattr(each, "weight"))
    print(f"perplexity {before:.2f} before training, {after:.2f} after; {zeros:,} zeros in the blocks")
    pruned.save_pretrained("trained")
    return before, after


def perplexity(model: AutoModelForCausalLM, tokenizer: AutoTokenizer, text: str, window: int) -> float:
    """Of a model in memory, on a file."""
    (value,) = besa.evaluate(model, [text], tokenizer=tokenizer, window=window, max_windows=20).perplexity.values()
    return value


if __name__ == "__main__":
    main(*sys.argv[1:])
