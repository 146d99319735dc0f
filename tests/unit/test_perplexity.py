"""Perplexity against a loop written by hand, and against what was recorded when the tiny Llama was trained."""

import hashlib
import json
import math
from types import SimpleNamespace

import pytest
import torch

from besa.errors import BesaError
from besa.evaluation.perplexity import perplexity
from besa.system import ranks
from tests.pretend_ranks import each_rank


@pytest.fixture(scope="module")
def tokens_L(tiny_llama_folder, tiny_tokenizer):
    text = (tiny_llama_folder / "heldout.txt").read_text(encoding="utf-8")
    return torch.tensor(tiny_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@torch.no_grad()
def by_hand(model, tokens_L, window) -> float:
    losses = []
    for start in range(0, len(tokens_L) - window + 1, window):
        tokens_T = tokens_L[start : start + window]
        logits_TV = model(input_ids=tokens_T[None]).logits[0].double()
        for place in range(window - 1):
            probabilities_V = logits_TV[place].softmax(dim=0)
            losses.append(-math.log(probabilities_V[tokens_T[place + 1]]))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(("length", "window", "windows"), [(100, 20, 5), (119, 20, 5), (33, 33, 1), (7, 2, 3)])
def test_perplexity_is_that_of_a_loop(tiny_llama, tokens_L, length, window, windows):
    result = perplexity(tiny_llama, tokens_L[:length], window)
    assert result.perplexity == pytest.approx(by_hand(tiny_llama, tokens_L[:length], window), rel=1e-5)
    assert (result.windows, result.predicted) == (windows, windows * (window - 1))


def test_the_tail_is_dropped(tiny_llama, tokens_L):
    whole = perplexity(tiny_llama, tokens_L[:60], 20)
    assert perplexity(tiny_llama, torch.cat([tokens_L[:60], tokens_L.new_zeros(19)]), 20) == whole
    assert perplexity(tiny_llama, torch.cat([tokens_L[:60], tokens_L.new_zeros(20)]), 20).windows == 4


def test_the_digest_is_of_the_tokens_that_were_measured(tiny_llama, tokens_L):
    whole = perplexity(tiny_llama, tokens_L[:60], 20)
    assert whole.sha256 == hashlib.sha256(tokens_L[:60].numpy().tobytes()).hexdigest()
    assert whole.sha256 != perplexity(tiny_llama, tokens_L[:60], 20, bos=0).sha256


def test_max_windows_takes_the_beginning(tiny_llama, tokens_L):
    assert perplexity(tiny_llama, tokens_L[:200], 20, max_windows=3) == perplexity(tiny_llama, tokens_L[:60], 20)
    assert perplexity(tiny_llama, tokens_L[:60], 20, max_windows=99) == perplexity(tiny_llama, tokens_L[:60], 20)


def test_bits_per_byte_are_those_of_the_tokens_by_their_bytes(tiny_llama, tokens_L):
    result = perplexity(tiny_llama, tokens_L[:100], 20, size_of=lambda tokens: 2.5 * tokens)
    assert result.bits_per_byte == pytest.approx(math.log2(result.perplexity) / 2.5, rel=1e-9)
    assert perplexity(tiny_llama, tokens_L[:100], 20).bits_per_byte is None


@torch.no_grad()
@pytest.mark.parametrize("windows", [1, 3])
def test_with_a_bos_token_all_tokens_of_the_text_are_predicted(tiny_llama, tokens_L, windows):
    losses = []
    for start in range(0, windows * 19, 19):
        own_T = tokens_L[start : start + 19]
        logits_TV = tiny_llama(input_ids=torch.cat([torch.tensor([5]), own_T])[None]).logits[0].double()
        losses += [-math.log(logits_TV[place].softmax(dim=0)[own_T[place]]) for place in range(19)]
    result = perplexity(tiny_llama, tokens_L[: windows * 19 + 18], 20, bos=5)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (result.windows, result.predicted, result.bos) == (windows, windows * 19, True)
    assert not perplexity(tiny_llama, tokens_L[:100], 20).bos


@pytest.mark.parametrize("batch", [1, 2, 7, 100])
def test_perplexity_does_not_depend_on_the_batch(tiny_llama, tokens_L, batch):
    expected = perplexity(tiny_llama, tokens_L[:300], 30)
    assert perplexity(tiny_llama, tokens_L[:300], 30, batch=batch).perplexity == pytest.approx(
        expected.perplexity, rel=1e-6
    )


@pytest.mark.parametrize(("window", "batch", "sizes"), [(512, None, [4, 1]), (3000, None, [1]), (1000, 2, [2, 1])])
def test_windows_in_a_forward_pass(window, batch, sizes):
    """By default as many as 2048 tokens hold, and always one."""
    seen = []
    model = uniform_model(seen)
    result = perplexity(model, torch.zeros(window * sum(sizes) + 1, dtype=torch.int64), window, batch=batch)
    assert [len(tokens_WT) for tokens_WT in seen] == sizes
    assert result.perplexity == pytest.approx(8)


def uniform_model(seen, logit=0.0):
    """A model that finds all of 8 tokens equally likely, however large its logits."""

    def forward(input_ids, use_cache):
        assert not use_cache
        seen.append(input_ids)
        return SimpleNamespace(logits=torch.full((*input_ids.shape, 8), logit))

    forward.device = torch.device("cpu")
    return forward


def test_progress_is_told(tiny_llama, tokens_L):
    told = []
    result = perplexity(tiny_llama, tokens_L[:100], 20, batch=2, progress=lambda *news: told.append(news))
    assert [(done, total) for done, total, _ in told] == [(2, 5), (4, 5), (5, 5)]
    assert told[-1][2] == f"perplexity {result.perplexity:.2f}"
    assert told[0][2] == f"perplexity {perplexity(tiny_llama, tokens_L[:40], 20).perplexity:.2f}"


@pytest.mark.parametrize("count", [2, 3, 20])  # 11 windows, in batches of 2: of 20 ranks, 14 have none
def test_any_number_of_ranks_finds_the_same_perplexity(tiny_llama, tokens_L, count):
    alone = perplexity(tiny_llama, tokens_L[:230], 20, batch=2)
    assert alone.windows == 11
    seen = []

    def measured():
        own = []
        seen.append(own)
        return perplexity(tiny_llama, tokens_L[:230], 20, batch=2, progress=lambda *news: own.append(news))

    assert each_rank(count, measured) == [alone] * count  # to the bit
    shares = seen[:count]
    assert [len(told) for told in shares] == {2: [3, 3], 3: [2, 2, 2]}.get(count, [len(told) for told in shares])
    assert sum(len(told) for told in shares) == 6  # forward passes: none is done twice
    assert all(told[-1][:2] == (11, 11) for told in shares if told)


def test_output_that_is_not_finite_on_one_rank_ends_all(tiny_llama, tokens_L):
    """The last window alone predicts NaN, and only the last rank has it."""

    def measured():
        def broken(input_ids, use_cache):
            logits = tiny_llama(input_ids=input_ids, use_cache=False).logits
            return SimpleNamespace(logits=logits * (math.nan if ranks.number() == 2 else 1))

        broken.device = torch.device("cpu")
        with pytest.raises(BesaError, match=r"^The model's output is NaN or infinite: .*\.$"):
            perplexity(broken, tokens_L[:230], 20, batch=2)

    assert each_rank(3, measured) == [None] * 3


def test_the_recorded_perplexity_is_met(tiny_llama, tiny_llama_folder, tokens_L):
    recorded = json.loads((tiny_llama_folder / "perplexity.json").read_text())["heldout"]
    result = perplexity(tiny_llama, tokens_L, recorded["window"])
    assert result.windows == recorded["windows"]
    assert result.perplexity == pytest.approx(recorded["perplexity"], rel=1e-4)


def test_a_hopeless_model_has_infinite_perplexity():
    def sure_of_the_wrong(input_ids, use_cache):
        logits_WTV = torch.zeros(*input_ids.shape, 2)
        logits_WTV[..., 1] = 1000.0
        return SimpleNamespace(logits=logits_WTV)

    sure_of_the_wrong.device = torch.device("cpu")
    assert perplexity(sure_of_the_wrong, torch.zeros(10, dtype=torch.int64), 5).perplexity == math.inf


@pytest.mark.parametrize("logit", [math.nan, math.inf])
def test_output_that_is_not_finite_is_refused(logit):
    with pytest.raises(BesaError, match=r"^The model's output is NaN or infinite: .*\.$"):
        perplexity(uniform_model([], logit), torch.zeros(10, dtype=torch.int64), 5)


@pytest.mark.parametrize(
    ("length", "window", "sentence"),
    [
        (19, 20, r"^The text has 19 tokens, fewer than one window of 20: use a smaller --window\.$"),
        (0, 20, r"^The text has 0 tokens, .*\.$"),
        (19, 1, r"^A window of 1 tokens predicts nothing: use at least 2\.$"),
        (19, 0, r"^A window of 0 tokens predicts nothing: use at least 2\.$"),
        (19, -5, r"^A window of -5 tokens predicts nothing: use at least 2\.$"),
    ],
)
def test_windows_that_do_not_work(length, window, sentence):
    with pytest.raises(BesaError, match=sentence):
        perplexity(uniform_model([]), torch.zeros(length, dtype=torch.int64), window)


@pytest.mark.parametrize("max_windows", [0, -1])
def test_no_windows_are_refused(max_windows):
    with pytest.raises(BesaError):
        perplexity(uniform_model([]), torch.zeros(100, dtype=torch.int64), 10, max_windows=max_windows)
