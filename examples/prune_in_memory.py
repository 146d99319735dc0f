"""Prune a model that you have loaded, in place, and go on using it.

python examples/prune_in_memory.py [MODEL] [TEXT] [RECIPE]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import besa


def main(
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct", text: str = "c4", recipe: str = "besa", seqlen: int = 512
) -> float:
    """Prune half of the weights; returns the sparsity, as it was counted.

    Args:
        model: Hugging Face id, or a folder.
        text: to calibrate on: an embedded one, or a file.
        recipe: a shipped one, or a YAML file.
        seqlen: tokens of a sequence.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model)

    pruned = besa.compress(
        loaded, recipe, text, tokenizer=tokenizer, sparsity=0.5, samples=16, seqlen=seqlen, progress=show
    )

    print(f"\n{pruned.record.zeros:,} of {pruned.record.weights:,} weights are zero now.")
    for block in pruned.record.blocks:
        print(f"block {block.index}: sparsity {block.sparsity:.4f}, error {block.reconstruction_error:.4f}")

    ids = tokenizer("The city lies on the river", return_tensors="pt")
    print(tokenizer.decode(loaded.generate(**ids, max_new_tokens=12, do_sample=False)[0]))
    loaded.save_pretrained("pruned-in-memory")  # zeros in a dense model; `besa pack` makes the files smaller
    tokenizer.save_pretrained("pruned-in-memory")
    return pruned.record.sparsity


def show(done: float, total: float, note: str = "") -> None:
    """One line that follows the run; besa calls it."""
    print(f"\r{done:.0f} of {total:.0f} {note:40}", end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
