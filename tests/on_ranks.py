"""Every kind of method on tiny models, by one rank or several, with a digest of each result.

python -m tests.on_ranks FOLDER all                          # one rank
torchrun --nproc-per-node 3 -m tests.on_ranks FOLDER first
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

import besa
from besa.methods.recipe import Recipe
from besa.system import ranks
from besa.system.joining import joined

DIGESTS = "digests.json"
TINY_LLAMA = Path(__file__).parent / "assets" / "tiny-llama"
TEXT = str(TINY_LLAMA / "calibration.txt")
BLOCKS = {"first": 2, "all": 4}  # of its 8: even numbers, for pairs of blocks
EIGHT_EXPERTS = MixtralConfig(
    vocab_size=1024,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=8,
    num_experts_per_tok=1,
)
TWO_EACH = ["allocation.batch=2", "allocation.steps=9"]
CASES: dict[str, tuple[str, list[str]]] = {
    "wanda": ("wanda", []),
    "magnitude": ("magnitude", []),
    "ria": ("ria", ["sparsity=0.6"]),
    "sparsegpt": ("sparsegpt", []),
    "fast": ("fast", []),
    "best": ("best", ["finetune={method: adam, epochs: 2, batch: 1}", "distill={method: kl, epochs: 1, batch: 1}"]),
    "distilled": ("wanda", ["distill={method: kl, learns: both, epochs: 2, further: true, rate: 0.003, batch: 1}"]),
    "besa": ("besa", TWO_EACH),
    "besa-layerwise": ("besa-layerwise", [*TWO_EACH, "allocation.granularity=attn-mlp"]),
    "besa-pruned-teacher": ("besa", [*TWO_EACH, "allocation.teacher=pruned"]),
    "besa-two-blocks": ("besa", [*TWO_EACH, "allocation.granularity=two-blocks"]),
    "besa-int4": ("besa-int4", TWO_EACH),
    "best-int4": (
        "best-int4",
        ["quantization.group=32", "distill={method: kl, epochs: 1, batch: 1}", "skip=['*.layers.[23].*']"],
    ),
    "wanda-int4": ("wanda-int4", ["quantization.batch=2"]),
    "2-of-4": ("sparsegpt", ["allocation={method: nm}"]),
    "mixed patterns": ("wanda", ["allocation={method: nm, mixed: true}"]),
    "structured": ("wanda", ["allocation.method=structured"]),
    "widths": ("wanda", ["sparsity=0.2", "allocation.method=structured", "targets.method=sensitivity"]),
    "depth": ("depth", ["allocation.blocks=2"]),
    "attention": ("depth", ["allocation.layers=attention", "allocation.blocks=3"]),
    "owl": ("sparsegpt", ["targets.method=owl"]),
    "search": ("wanda", ["targets.method=search"]),
}
FIRST = ("fast", "besa")  # those of the fast tests
ON_EXPERTS = ("wanda", "sparsegpt", "fast", "best", "distilled", "besa")  # of a mixture, ranks see different experts
IN_FLOAT16 = ("best", "besa", "distilled")  # of few as well: losses are scaled on ranks without a sequence too
OF_WHOLE_EXPERTS = {"dropped": ("fast", ["experts={method: reap}"])}
ON_FEW = (
    "fast",
    "best",
    "distilled",
    "besa",
    "structured",
    "depth",
    "search",
)  # two sequences in one batch: other ranks have none


def main(out: Path, which: str) -> None:
    """Prune by every method, or by the `first`; rank 0 writes digests to the file DIGESTS in the folder `out`."""
    torch.set_num_threads(1)
    with joined():
        recipes = {name: Recipe.load(recipe, overrides=changes) for name, (recipe, changes) in CASES.items()}
        experts, shallow = out / "experts", out / "shallow"
        if ranks.is_first():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(EIGHT_EXPERTS).save_pretrained(experts)
            AutoModelForCausalLM.from_pretrained(TINY_LLAMA, num_hidden_layers=BLOCKS[which]).save_pretrained(shallow)
        ranks.wait()
        digests = {name: _digest(shallow, recipes[name], 11, out / name) for name in _some(CASES, which)}
        for name in _some(ON_EXPERTS, which):
            digests[f"{name} of experts"] = _digest(experts, recipes[name], 11, out / f"{name}-experts")
        for name, (recipe, changes) in OF_WHOLE_EXPERTS.items():
            digests[name] = _digest(experts, Recipe.load(recipe, overrides=changes), 11, out / name)
        for name in _some(ON_FEW, which):
            digests[f"{name} of few"] = _digest(shallow, recipes[name], 2, out / f"{name}-few")
        for name in _some(IN_FLOAT16, which):
            digests[f"{name} in float16"] = _digest(shallow, recipes[name], 2, out / f"{name}-16", dtype="float16")
        if ranks.is_first():
            (out / DIGESTS).write_text(json.dumps(digests))


def _some(names: Iterable[str], which: str) -> list[str]:
    return [name for name in names if which == "all" or name in FIRST]


def _digest(model: Path, recipe: Recipe, samples: int, out: Path, dtype: str = "auto") -> dict[str, Any]:
    """The number of zeros, a digest of the tensors, and what was measured."""
    sizes = {"samples": samples, "seqlen": 24, "batch": 2, "dtype": dtype}
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    record = besa.compress(model, recipe, TEXT, out=out, **sizes, tokenizer=tokenizer, device="cpu").record
    return {
        "zeros": record.zeros,
        "tensors": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
        "losses": [block.losses + block.finetuning for block in record.blocks],
        "distilling": record.distilling.losses if record.distilling is not None else [],
        "dropped": [mixture.gone for mixture in record.mixtures],
        "errors": [block.reconstruction_error for block in record.blocks],
        "sent": [block.sent for block in record.blocks],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
