"""What distilling learns from: sequences that are held out, and new ones for every epoch."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import besa
from besa.data.calibration import Calibration
from besa.data.mixture import interleaved
from besa.methods.distilling import TrainingSet, trainer
from besa.methods.distilling.training_set import needed
from besa.methods.recipe import Recipe
from besa.methods.steps import split
from besa.system.ranks import Share, together


def numbered(samples):
    """Sequences that tell their places among those drawn."""
    return Calibration(torch.arange(samples)[:, None].expand(-1, 3).contiguous(), "numbers", 0)


@given(samples=st.integers(1, 60), epochs=st.integers(1, 9), more=st.integers(0, 5))
def test_every_epoch_has_sequences_of_its_own(samples, epochs, more):
    held, learned = split(samples)
    drawn = numbered(needed(samples, epochs) + min(more, samples - len(held) - 1) * (samples > 1))
    made = TrainingSet.of(drawn, samples)
    tokens = made.calibration.tokens_NT[:, 0].tolist()
    assert made.epochs == (epochs if samples > 1 else 1)
    assert len(made.held) == len(held)
    parts = [made.held, *map(made.learned, range(made.epochs))] if samples > 1 else [made.held]
    assert all(len(part) == len(learned) for part in parts[1:])
    assert sorted(place for part in parts for place in part) == list(range(len(tokens)))
    assert len(set(tokens)) == len(tokens) == needed(samples, made.epochs)
    assert set(tokens) <= set(drawn.tokens_NT[:, 0].tolist())
    assert made.learned(made.epochs) == made.learned(0)  # and then they come again


@given(samples=st.integers(1, 60))
def test_the_calibration_set_is_held_out_and_learned_from_as_by_other_stages(samples):
    made = TrainingSet(numbered(samples))
    assert (made.held, made.learned(0), made.learned(1)) == (*split(samples), split(samples)[1])


@pytest.mark.parametrize("epochs", [2, 3, 4, 9])
def test_every_epoch_has_the_texts_of_a_mixture_by_their_shares(epochs):
    each = needed(64, epochs) // 5
    for seed in range(5):
        texts = torch.repeat_interleave(torch.arange(5), each)[interleaved(5 * [each], seed)]
        made = TrainingSet.of(Calibration(texts[:, None].expand(-1, 2).contiguous(), "mix", seed), 64)
        tokens = made.calibration.tokens_NT[:, 0]
        for part in (made.held, *map(made.learned, range(made.epochs))):
            found = Counter(tokens[part].tolist())
            assert all(abs(found[text] - len(part) / 5) < 2 for text in range(5))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_have_equal_work_in_every_epoch(ranks):
    made = TrainingSet.of(numbered(needed(64, 3)), 64)
    for epoch in range(3):
        works = []
        for number in range(ranks):
            with together(number, ranks):
                works.append(len(Share.of(made.calibration.samples).own(made.learned(epoch))))
        assert max(works) - min(works) <= 1


TEXT = "calibration.txt"
AGAIN = "Distilling asks for 22 sequences, but has 8: later epochs learn from the same again."


def learned_from(monkeypatch, model, tokenizer, calibration, **sizes):
    """The record of a run of three epochs of one step, and the tokens of each step."""
    seen = []
    step = trainer.Trainer._step

    def watched(self, values, optimizer, scaler, sequences):
        seen.append(self._student.tokens_NT[sequences])
        step(self, values, optimizer, scaler, sequences)

    monkeypatch.setattr(trainer.Trainer, "_step", watched)
    recipe = Recipe.load("wanda", None, ["distill={method: kl, epochs: 3, rate: 0.0003, further: true, batch: 7}"])
    return besa.compress(model, recipe, calibration, tokenizer=tokenizer, **sizes).record, seen


def test_further_sequences_are_drawn_from_the_same_text(monkeypatch, tiny_llama, tiny_tokenizer, tiny_llama_folder):
    text = str(tiny_llama_folder / TEXT)
    record, steps = learned_from(monkeypatch, tiny_llama, tiny_tokenizer, text, samples=8, seqlen=48, dtype="float32")
    assert [len(tokens) for tokens in steps] == [7, 7, 7]
    sequences = {tuple(row) for tokens in steps for row in tokens.tolist()}
    assert len(sequences) == 21
    study = record.distilling.study
    assert (study["source"], study["samples"], study["seqlen"]) == (text, 1 + 3 * 7, 48)
    assert study["sha256"] != record.calibration["sha256"]
    assert record.calibration == {**study, **{key: record.calibration[key] for key in ("samples", "seed", "sha256")}}
    assert AGAIN not in record.notes
    losses = record.distilling.losses
    assert losses[-1] < losses[0]


def test_what_there_is_of_a_short_text_comes_again(
    monkeypatch, tiny_llama, tiny_tokenizer, tiny_llama_folder, tmp_path
):
    """Enough for one set and a half: the second epoch has the sequences of the first."""
    tokens = tiny_tokenizer((tiny_llama_folder / TEXT).read_text()).input_ids[: 12 * 48]
    short = tmp_path / "short.txt"
    short.write_text(tiny_tokenizer.decode(tokens))
    record, steps = learned_from(monkeypatch, tiny_llama, tiny_tokenizer, str(short), samples=8, seqlen=48)
    assert record.distilling.study["samples"] == 8
    assert record.notes[-1] == AGAIN
    epochs = [sorted(tokens.tolist()) for tokens in steps]
    assert epochs[0] == epochs[1] == epochs[2]


def test_token_batches_have_no_further_ones(monkeypatch, tiny_llama, tiny_tokenizer):
    tokens = torch.randint(3, 1000, (8, 24), generator=torch.Generator().manual_seed(0))
    record, steps = learned_from(monkeypatch, tiny_llama, tiny_tokenizer, Calibration(tokens, "random tokens", 0))
    assert record.distilling.study == record.calibration
    assert record.notes[-1] == AGAIN
    assert sorted(steps[2].tolist()) == sorted(tokens[1:].tolist())
