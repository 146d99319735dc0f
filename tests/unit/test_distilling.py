"""Distilling: the loss and its gradients against plain torch, what may change, and what must not."""

import copy
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

import besa
from besa.methods.distilling import Distilled, MaskedKL, NoDistilling
from besa.methods.distilling.trainer import CLIPPED, Trainer
from besa.methods.recipe import Recipe
from besa.models.ends import capture_inputs
from besa.models.finding import find_blocks
from besa.models.kept import kept_of
from besa.models.whole import Whole
from besa.observing import prediction_loss as observing
from besa.observing.prediction_loss import prediction_loss, tokens_at_once
from tests.slowly import some_slow

WIDTH, VOCABULARY = 8, 50


def plain_divergence(logits, teacher):
    """The mean over tokens of KL(teacher ‖ model), by its definition."""
    p = teacher.softmax(-1)
    return (p * (teacher.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()


def plain_loss(logits, teacher, tokens, factor):
    """The divergence, and of all tokens but the last of a sequence the cross-entropy of the next one."""
    next_tokens = functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="sum")
    return plain_divergence(logits, teacher) + factor * next_tokens / tokens.numel()


@pytest.mark.parametrize(("at_once", "factor"), [(1, 0.5), (3, 0.5), (6, 2.0), (7, 0.5), (100, 0.5), (3, 0.0)])
def test_loss_and_gradients_are_those_of_plain_torch(at_once, factor):
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, 7))
    y, target = torch.randn(2, 7, WIDTH, dtype=torch.float64), torch.randn(2, 7, WIDTH, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)
    gains = [torch.rand(WIDTH, dtype=torch.float64).requires_grad_() for _ in range(2)]
    gains[1].data.copy_(gains[0])

    def head(x, gain):
        return (x * gain @ weight.T).tanh() * 5  # with capped logits, as some families have

    heads = (lambda part, x: head(x, gains[0]), lambda part, x: head(x, 1.0))
    learned = (*heads, y, target, tokens, factor, at_once)
    loss, gradient = prediction_loss(*learned, torch.tensor(3.0, dtype=y.dtype))
    leaf = y.clone().requires_grad_()
    expected = plain_loss(head(leaf, gains[1]), head(target, 1.0), tokens, factor)
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gains[0].grad, gains[1].grad, rtol=1e-10, atol=1e-14)
    measured, nothing = prediction_loss(*learned)
    assert measured == loss
    assert not nothing.any()


def test_a_single_token_has_no_next_one():
    y, target = torch.randn(1, 1, 5), torch.randn(1, 1, 5)
    head = lambda part, x: x  # noqa: E731
    loss, _ = prediction_loss(head, head, y, target, torch.tensor([[3]]), 0.5, 4, torch.ones(()))
    torch.testing.assert_close(loss, plain_divergence(y, target))


def test_tokens_that_are_ruled_out_do_not_count():
    """A logit of −∞ in both models, as of padded vocabularies."""
    y, target, tokens = torch.randn(1, 4, 5), torch.randn(1, 4, 5), torch.tensor([[3, 1, 4, 1]])
    out = torch.tensor([0.0, 0.0, float("-inf"), 0.0, 0.0])
    head = lambda part, x: x + out  # noqa: E731
    loss, gradient = prediction_loss(head, head, y, target, tokens, 0.5, 4, torch.ones(()))
    kept, kept_tokens = [0, 1, 3, 4], torch.tensor([[2, 1, 3, 1]])
    torch.testing.assert_close(loss, plain_loss(y[..., kept], target[..., kept], kept_tokens, 0.5))
    assert gradient.isfinite().all()
    assert not gradient[..., 2].any()
    tokens[0, 1] = 2  # a text may have it where the text does not count
    loss, _ = prediction_loss(head, head, y, target, tokens, 0.0, 4)
    torch.testing.assert_close(loss, plain_divergence(y[..., kept], target[..., kept]))


def test_memory_for_logits_is_bounded():
    assert tokens_at_once(49_152) * 49_152 * 4 <= observing.LOGITS
    assert tokens_at_once(262_144) * 262_144 * 4 == observing.LOGITS
    assert tokens_at_once(10**9) == 1


def test_gradients_of_a_whole_model_are_those_of_plain_torch(tiny_llama):
    """Of linears, of norms in the blocks, and of the final norm, in float64."""
    model, dense = tiny_llama.double(), copy.deepcopy(tiny_llama).double()
    tokens = torch.randint(3, 1000, (1, 16), generator=torch.Generator().manual_seed(0))
    blocks = find_blocks(model)
    (x,) = capture_inputs(model, blocks, tokens, 1)
    whole = Whole(model, blocks)
    assert set(whole.vectors) == {name for name, p in model.named_parameters() if p.dim() == 1}
    linears = ["model.layers.0.self_attn.q_proj", "model.layers.5.mlp.down_proj"]
    vectors = ["model.layers.7.input_layernorm.weight", "model.norm.weight"]
    assert [whole.place(name) for name in [*linears, *vectors]] == [
        *(f"model.layers.{at}" for at in (0, 5, 7)),
        "",
    ]
    generator = torch.Generator().manual_seed(1)
    values = {}
    for name in [*linears, *vectors]:
        own = whole.own(name)
        values[name] = own + 0.1 * own.std() * torch.randn(own.shape, generator=generator, dtype=own.dtype)
        values[name].requires_grad_()
    target = dense.model(tokens).last_hidden_state
    with_head = dense(tokens).logits
    states = whole.states(x, values, torch.float64)
    assert len(states) == 9
    loss, gradient = prediction_loss(
        lambda part, y: whole.logits(tokens[:, part], y, values, torch.float64),
        lambda part, y: y @ dense.lm_head.weight.T,
        states[-1],
        target,
        tokens,
        0.5,
        5,
        torch.ones((), dtype=torch.float64),
    )
    whole.send_back(states, gradient, values, torch.float64)

    leaves = {
        name if name in vectors else f"{name}.weight": v.detach().clone().requires_grad_() for name, v in values.items()
    }
    expected = plain_loss(functional_call(model, leaves, (tokens,)).logits, with_head, tokens, 0.5)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=0)
    for value, leaf in zip(values.values(), leaves.values(), strict=True):
        torch.testing.assert_close(value.grad, leaf.grad, rtol=1e-6, atol=1e-12)


def test_kept_weights_alone_learn_what_the_whole_matrix_learns(tiny_llama):
    """To the bit: the same products, and the same gradients where weights are kept."""
    blocks = find_blocks(tiny_llama)
    (x,) = capture_inputs(tiny_llama, blocks, torch.arange(3, 19)[None], 1)
    whole, name = Whole(tiny_llama, blocks), "model.layers.7.mlp.down_proj"
    own = whole.own(name)
    own.masked_fill_(torch.rand(own.shape, generator=torch.Generator().manual_seed(0)) < 0.5, 0)
    dense, kept = own.clone().requires_grad_(), kept_of(own).requires_grad_()
    outputs = []
    for value in (dense, kept):
        states = whole.states(x, {name: value}, torch.float32)
        outputs.append(states[-1])
        whole.send_back(states, torch.ones_like(states[-1]), {name: value}, torch.float32)
    assert torch.equal(*outputs)
    assert torch.equal(kept.grad, dense.grad[own != 0])


def distilled(model, tokenizer, folder, samples=17, **settings):
    """The record of a model that is pruned in place by Wanda, and distilled if there are settings."""
    overrides = [f"distill.{name}={value}" for name, value in ({"method": "kl"} | settings).items() if settings]
    recipe = Recipe.load("wanda", None, overrides)
    text = str(folder / "calibration.txt")
    return besa.compress(model, recipe, text, tokenizer=tokenizer, samples=samples, seqlen=48).record


def tensors(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def wanda(pristine_tiny_llama, tiny_tokenizer, tiny_llama_folder):
    """The tensors of the tiny model as Wanda prunes it, by the number of sequences."""

    def pruned(samples):
        model = copy.deepcopy(pristine_tiny_llama)
        distilled(model, tiny_tokenizer, tiny_llama_folder, samples)
        return tensors(model)

    return cache(pruned)


@pytest.mark.parametrize("learns", some_slow(["weights", "both", "together"], {"weights", "together"}))
def test_predictions_come_closer_and_zeros_stay(learns, wanda, tiny_llama, tiny_tokenizer, tiny_llama_folder):
    record = distilled(tiny_llama, tiny_tokenizer, tiny_llama_folder, learns=learns, epochs=1, rate=0.003)
    losses = record.distilling.losses
    assert len(losses) == (3 if learns == "both" else 2)
    assert losses == sorted(set(losses), reverse=True)
    assert record.zeros == record.weights // 2
    changed = {name for name, tensor in tensors(tiny_llama).items() if not torch.equal(tensor, wanda(17)[name])}
    linears = {f"{linear.name}.weight" for block in record.blocks for linear in block.linears}
    vectors = {name for name, tensor in wanda(17).items() if tensor.dim() == 1}
    assert changed == (linears if learns == "weights" else linears | vectors)
    for name in linears:
        assert torch.equal(tiny_llama.get_parameter(name) == 0, wanda(17)[name] == 0), name


def test_losses_are_those_of_held_out_sequences(pristine_tiny_llama, tiny_tokenizer, tiny_llama_folder):
    dense, model = pristine_tiny_llama, copy.deepcopy(pristine_tiny_llama)
    tokens = torch.randint(3, 1000, (18, 24), generator=torch.Generator().manual_seed(0))
    recipe = Recipe.load(
        "wanda", None, ["distill={method: kl, epochs: 1, rate: 0.01, cross_entropy: 0.7, autocast: false}"]
    )
    calibration = besa.Calibration(tokens, "random tokens", 0)
    record = besa.compress(model, recipe, calibration, tokenizer=tiny_tokenizer).record
    with torch.no_grad():
        by_hand = plain_loss(model(tokens[::8]).logits, dense(tokens[::8]).logits, tokens[::8], 0.7)
    assert record.distilling.losses[-1] < record.distilling.losses[0]
    assert record.distilling.losses[-1] == pytest.approx(float(by_hand), rel=1e-4)


def test_where_nothing_helps_weights_stay_as_they_were(wanda, tiny_llama, tiny_tokenizer, tiny_llama_folder):
    record = distilled(tiny_llama, tiny_tokenizer, tiny_llama_folder, samples=5, learns="together", epochs=5, rate=2.0)
    assert len(record.distilling.losses) == 3  # two epochs in a row that do not help are the last
    assert min(record.distilling.losses[1:]) > record.distilling.losses[0]
    head = 1024 * 96 / sum(parameter.numel() for parameter in tiny_llama.model.layers.parameters())
    assert record.distilling.passes == pytest.approx(1 + (2 * (4 + 3 * head) * 7 + 3 * (1 + 2 * head)) / 8)
    for name, tensor in tensors(tiny_llama).items():
        assert torch.equal(tensor, wanda(5)[name]), name


@pytest.mark.parametrize("dtype", some_slow([torch.bfloat16, torch.float16], {torch.bfloat16}))
def test_half_precision_learns_in_full(dtype, tiny_llama, tiny_tokenizer, tiny_llama_folder):
    model = tiny_llama.to(dtype)
    record = distilled(model, tiny_tokenizer, tiny_llama_folder, epochs=1, rate=0.003)
    assert record.distilling.losses[1] < record.distilling.losses[0]
    zeros = sum(int((model.get_submodule(part.name).weight == 0).sum()) for b in record.blocks for part in b.linears)
    assert (zeros, model.dtype) == (record.zeros, dtype)


def test_steps_are_a_share_of_each_tensor_and_fall(monkeypatch, tiny_llama, tiny_tokenizer, tiny_llama_folder):
    rates = []

    class Watched(torch.optim.Adam):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            norms = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
            assert torch.stack(norms).norm() <= CLIPPED * 1.0001
            return super().step()

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    record = distilled(tiny_llama, tiny_tokenizer, tiny_llama_folder, samples=23, epochs=1, rate=0.002)
    assert len(rates) == 20  # of 23 sequences, 3 are held out; the first step is 5 % of them
    falling = [share / 20 for share in range(20, 0, -1)]
    assert rates == pytest.approx([rates[0] * share for share in falling])
    (name,) = [linear.name for linear in record.blocks[0].linears if linear.name.endswith("q_proj")]
    kept = tensors(tiny_llama)  # after the run; its root mean square has hardly changed
    kept = kept[f"{name}.weight"]
    assert rates[0] == pytest.approx(0.002 * float(kept[kept != 0].square().mean().sqrt()), rel=0.02)


def test_steps_grow_at_first():
    trainer = object.__new__(Trainer)
    trainer._settings, trainer._epochs, trainer._steps = MaskedKL(rate=0.1, batch=4), 4, 10
    rates = [trainer._rate(step) for step in range(40)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.2 * 38 / 39])
    assert rates[-1] == pytest.approx(0.2 / 39)


def test_an_epoch_that_does_not_help_is_taken_back(monkeypatch, tiny_llama, tiny_tokenizer, tiny_llama_folder):
    """Held-out losses are pretended. The second epoch is taken back, and steps are smaller from there on."""
    losses, seen, rates = iter([9.0, 8.0, 8.5, 7.0, 7.5, 7.6, 1.0]), [], []

    def held_out_loss(trainer, values):
        seen.append({name: value.detach().clone() for name, value in values.items()})
        return next(losses)

    class Watched(torch.optim.Adam):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            if len(rates) % 4 == 1 and len(seen) in (2, 3):  # at the beginning of the second epoch, and of the third
                (value,) = self.param_groups[0]["params"]
                assert torch.equal(value, next(iter(seen[1].values())))
            return super().step()

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    monkeypatch.setattr(Trainer, "_held_out_loss", held_out_loss)
    record = distilled(tiny_llama, tiny_tokenizer, tiny_llama_folder, samples=5, epochs=9, rate=1e-4)
    assert record.distilling.losses == [9.0, 8.0, 8.5, 7.0, 7.5, 7.6]
    plain = [min((step + 1) / 2, (36 - step) / 35) for step in range(20)]
    eased = [1.0] * 8 + [0.3] * 8 + [0.09] * 4
    assert [rate / rates[1] for rate in rates] == pytest.approx([a * b for a, b in zip(plain, eased, strict=True)])
    kept = tensors(tiny_llama)
    for name, value in seen[3].items():
        torch.testing.assert_close(kept_of(kept[f"{name}.weight"]), value, rtol=0, atol=0)


@pytest.mark.parametrize(("minutes", "epochs"), [(10.0, 5), (2.0, 0), (5.6, 2)])
def test_minutes_are_filled_with_whole_epochs(minutes, epochs):
    """Three minutes are gone when a pass over an eighth takes 10 seconds: an epoch takes 4.5 × 7 + 1 times as long, and
    for the head of a quarter of the blocks 1.5 in place of 1."""
    trainer = object.__new__(Trainer)
    trainer._settings = MaskedKL(minutes=minutes)
    trainer._student = SimpleNamespace(seconds=180, head=0.0)
    expected = (60 * minutes - 180 - 2.6) / (2.6 * (4 * 7 + 1))
    assert trainer._fitting(2.6) == max(0, int(expected)) == epochs
    trainer._student.head = 0.25
    assert trainer._fitting(2.6) == max(0, int((60 * minutes - 182.6) / (2.6 * (4.75 * 7 / 1.5 + 1))))


def test_minutes_decide_how_far_steps_reach(monkeypatch, tiny_llama, tiny_tokenizer, tiny_llama_folder):
    same = copy.deepcopy(tiny_llama)
    monkeypatch.setattr(Trainer, "_fitting", lambda self, seconds: 2)
    within = distilled(tiny_llama, tiny_tokenizer, tiny_llama_folder, samples=5, minutes=1, rate=0.003)
    monkeypatch.undo()
    chosen = distilled(same, tiny_tokenizer, tiny_llama_folder, samples=5, epochs=2, rate=0.003)
    assert within.distilling.epochs == chosen.distilling.epochs == 2
    assert within.distilling.losses == chosen.distilling.losses
    for name, tensor in tensors(same).items():
        assert torch.equal(tensor, tensors(tiny_llama)[name]), name


def test_too_few_minutes_leave_the_model_as_its_blocks_are(wanda, tiny_llama, tiny_tokenizer, tiny_llama_folder):
    record = distilled(tiny_llama, tiny_tokenizer, tiny_llama_folder, samples=5, minutes=1e-6)
    assert (record.distilling.epochs, len(record.distilling.losses)) == (0, 1)
    for name, tensor in tensors(tiny_llama).items():
        assert torch.equal(tensor, wanda(5)[name]), name


def test_what_does_nothing_does_nothing():
    assert NoDistilling().distill(None, None, None) == Distilled(0, [], False, [])
    assert (NoDistilling().passes(0.5), NoDistilling().learning_bytes(5, 5)) == (0, 0)


def test_what_learns_at_once():
    for learns, stages in {
        "weights": [["w"]],
        "norms": [["n"]],
        "both": [["n"], ["w"]],
        "together": [["w", "n"]],
    }.items():
        assert MaskedKL(learns=learns).stages(["w"], ["n"]) == stages
    assert MaskedKL(learns="both").stages(["w"], []) == [["w"]]
