"""On a trained mixture, the experts that REAP keeps predict better than those that others keep, for held-out text."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from besa import Recipe, compress
from besa.models.fewer import take_out
from besa.models.finding import find_blocks
from besa.models.mixtures import fewer, find_mixtures
from experiments.tiny_llama import measure

TINY = Path(__file__).parents[1] / "assets" / "tiny-mixture"
EXPERTS, LONGEST = 16, 9000  # tokens of the held-out text


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


@cache
def heldout() -> torch.Tensor:
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")
    encoded = AutoTokenizer.from_pretrained(TINY)(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"][:LONGEST])


def load() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def by_score(method: str, share: float, tokenizer: Any) -> float:
    model = load()
    recipe = Recipe.load("wanda", 0, [f"experts={{method: {method}, share: {share}}}"])
    text = str(TINY / "calibration.txt")
    record = compress(model, recipe, text, samples=32, seqlen=128, tokenizer=tokenizer).record
    assert [len(mixture.gone) for mixture in record.mixtures] == [round(share * EXPERTS)] * 4
    return measure(model, heldout())[1]


def at_random(seed: int, share: float) -> float:
    model, drawn = load(), random.Random(seed)
    blocks = find_blocks(model)
    mixtures, kept = find_mixtures(model, blocks), EXPERTS - round(share * EXPERTS)
    shapes = fewer(model, blocks, mixtures, kept)
    take_out(model, shapes, {each.name: sorted(drawn.sample(range(EXPERTS), kept)) for each in mixtures.each})
    return measure(model, heldout())[1]


@pytest.mark.parametrize(
    "share", [pytest.param(0.25, marks=pytest.mark.slow), pytest.param(0.5, marks=pytest.mark.slow)]
)
def test_reap_beats_frequency_and_chance(share: float, tokenizer: Any) -> None:
    dense = measure(load(), heldout())[1]
    reap, frequency = (by_score(method, share, tokenizer) for method in ("reap", "frequency"))
    chance = [at_random(seed, share) for seed in range(3)]
    assert dense < reap < min(frequency, *chance)
