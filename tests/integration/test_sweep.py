"""Every causal decoder of transformers is served or refused, and docs/models.md says which, and why.

The table of docs/models.md is made here: after a change, run this file with BESA_UPDATE_DOCS=1 and `-m slow`.
"""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.slowly import some_slow
from tests.sweep import FAMILIES, Outcome, outcome, packed

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
TABLE = re.compile(r"^\| model type .*?(?=^\n|\Z)", re.DOTALL | re.MULTILINE)
TOTALS = re.compile(r"^Of \d+ model types, .*?\.$", re.MULTILINE)
# Of each way in which blocks are called and make their outputs, one that is quick.
SUBSET = [
    "bamba",  # the model unpacks what a block puts out
    "bart",  # cross-attention that no token reaches
    "camembert",  # its first parameter is the head's
    "gemma3",  # a tower for images beside
    "gemma3n_text",  # several streams of hidden states
    "gemma4_text",  # inputs of each layer that depend on the tokens
    "gemma4_unified_text",  # shared keys and values
    "glm_moe_dsa",  # chosen tokens that go from block to block
    "longcat_flash",  # another name of the depth
    "openai-gpt",  # blocks put out lists
    "qwen3_next",
    "xglm",  # a mask by position
    "zamba2",  # shared weights
]


def row(found: Outcome) -> str:
    return f"| {found.family} | {found.kind} | {found.why.replace('|', chr(92) + '|')} |"


def totals(found: list[Outcome]) -> str:
    kinds = [own.kind for own in found]
    return (
        f"Of {len(kinds)} model types, {kinds.count('served')} are served, {kinds.count('refused')} are refused, and "
        f"{kinds.count('not built')} cannot be built small."
    )


@pytest.mark.parametrize("family", SUBSET)
def test_a_family_is_served_or_refused_as_the_docs_say(family: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    assert row(outcome(family, tmp_path, tiny_tokenizer)) in DOCS.read_text().splitlines()


def test_a_family_is_pruned_by_gradients_too(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Its blocks have matrices that are not pruned, and are closed when all gradients are measured."""
    assert outcome("deepseek_v32", tmp_path, tiny_tokenizer, "fast").kind == "served"


@pytest.mark.slow
def test_docs_list_what_becomes_of_every_family(tiny_tokenizer: Any, tmp_path: Path) -> None:
    found = [outcome(family, tmp_path / family, tiny_tokenizer) for family in FAMILIES]
    wanted = "\n".join(["| model type | outcome | why |", "|---|---|---|", *map(row, found)]) + "\n"
    if os.environ.get("BESA_UPDATE_DOCS"):
        text = TABLE.sub(lambda _: wanted, DOCS.read_text())
        DOCS.write_text(TOTALS.sub(lambda _: totals(found), text))
    text = DOCS.read_text()
    assert totals(found) in text
    table = TABLE.search(text)
    assert table and table[0] == wanted, (
        "docs/models.md is out of date: run `BESA_UPDATE_DOCS=1 pytest -m slow tests/integration/test_sweep.py`"
    )


QUICK = {  # all are packed, whatever becomes of them otherwise
    "afmoe",  # names the arguments of attention
    "deepseek_v4",  # one of its linears divides inputs into groups
    "falcon",  # has a linear of its own that computes as torch's
    "jamba",  # reads the weight of a linear
    "olmo",  # has no parameters but those of linears and embeddings
}
TRANSPOSED = {"gpt-sw3", "gpt2", "openai-gpt"}  # have no linears to pack


@pytest.mark.parametrize("family", some_slow(FAMILIES, set(FAMILIES) - QUICK))
def test_a_packed_family_computes_what_the_dense_one_does(family: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    served = f"| {family} | served |" in DOCS.read_text() and family not in TRANSPOSED
    assert packed(family, tmp_path, tiny_tokenizer) or not (served or family in QUICK)
