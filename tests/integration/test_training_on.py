"""Pruned models that are trained on: the same zeros under any optimiser, in a loop, in a Trainer and with LoRA."""

import copy
import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.optimization import Adafactor
from transformers.trainer_utils import get_last_checkpoint

import besa
from besa import BesaError
from tests.slowly import some_slow

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
Masks = dict[str, Tensor]
OPTIMISERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda learned: torch.optim.AdamW(learned, lr=1e-3, weight_decay=0.1),
    "fused AdamW": lambda learned: torch.optim.AdamW(learned, lr=1e-3, weight_decay=0.1, fused=True),
    "SGD": lambda learned: torch.optim.SGD(learned, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adafactor": lambda learned: Adafactor(learned, lr=1e-3, relative_step=False, scale_parameter=False, beta1=0.9),
    "Muon": lambda learned: torch.optim.Muon([each for each in learned if each.dim() == 2], lr=1e-3),
}


def prune(model: PreTrainedModel) -> PreTrainedModel:
    """Half of each matrix of the blocks set to zero by magnitude; the down projections as 2:4."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name or "experts" in name or "attn.c_" in name or "mlp.c_" in name:
                groups = weight.view(-1, 4) if "down" in name else weight.flatten()[None]
                groups.scatter_(1, groups.abs().topk(groups.shape[1] // 2, largest=False).indices, 0)
    return model


def masks_of(model: nn.Module) -> Masks:
    return {
        name: weight == 0 for name, weight in model.named_parameters() if weight.dim() > 1 and bool((weight == 0).any())
    }


@cache
def tokens() -> Tensor:
    text = (TINY / "calibration.txt").read_text()[:20_000]
    return torch.tensor(AutoTokenizer.from_pretrained(TINY)(text)["input_ids"])


def batch(number: int) -> Tensor:
    return tokens()[number * 128 :][:128].view(4, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, pruned by besa."""
    out = tmp_path_factory.mktemp("training") / "pruned"
    besa.compress(TINY, "wanda", str(TINY / "calibration.txt"), out=out, samples=2, seqlen=16)
    return out


@pytest.fixture
def pruned(shallow_llama: PreTrainedModel) -> PreTrainedModel:
    return prune(shallow_llama).requires_grad_(True)


def train(
    model: nn.Module, optimiser: torch.optim.Optimizer, steps: int = 5, parts: int = 2, held: Masks | None = None
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms; `held` are masks that are kept by hand, as a reference."""
    losses, norms, named = [], [], dict(model.named_parameters())
    for step in range(steps):
        optimiser.zero_grad()
        for part in batch(step % 3).chunk(parts):
            loss = model(input_ids=part, labels=part).loss / parts
            loss.backward()
        for name, mask in (held or {}).items():
            named[name].grad[mask] = 0
        norms.append(float(clip_grad_norm_(named.values(), 0.5)))
        optimiser.step()
        with torch.no_grad():
            for name, mask in (held or {}).items():
                named[name][mask] = 0
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize("name", some_slow(OPTIMISERS, {"fused AdamW", "Muon"}))
def test_zeros_are_kept_and_the_rest_learns_as_by_hand(pruned: PreTrainedModel, name: str) -> None:
    masks, by_hand = masks_of(pruned), copy.deepcopy(pruned)
    assert len(masks) == 7 * 3
    with besa.keep_masks(pruned) as kept:
        assert kept.sparsity == 0.5
        losses, norms = train(pruned, OPTIMISERS[name](pruned.parameters()))
        kept.check()
    assert losses[3] < losses[0]
    assert train(by_hand, OPTIMISERS[name](by_hand.parameters()), held=masks) == (losses, norms)
    learned = dict(by_hand.named_parameters())
    assert all(torch.equal(weight, learned[name]) for name, weight in pruned.named_parameters())
    after = masks_of(pruned)
    assert masks.keys() == after.keys()
    assert all(torch.equal(mask, after[place]) for place, mask in masks.items())
    assert not any(weight.signbit()[masks[name]].any() for name, weight in pruned.named_parameters() if name in masks)


def test_without_it_the_zeros_are_lost(pruned: PreTrainedModel) -> None:
    kept = besa.keep_masks(pruned)
    kept.remove()
    kept.remove()
    train(pruned, OPTIMISERS["AdamW"](pruned.parameters()), steps=1)
    with pytest.raises(BesaError, match=r"zeros of model\.layers\.0\.self_attn\.q_proj\.weight were lost"):
        kept.check()
    kept.apply()
    kept.check()


def test_old_momentum_does_not_bring_weights_back(pruned: PreTrainedModel) -> None:
    optimiser = OPTIMISERS["SGD"](pruned.parameters())
    train(pruned, optimiser, steps=2)
    masks = masks_of(prune(pruned))
    with besa.keep_masks(pruned):
        train(pruned, optimiser, steps=2)
    assert all(torch.equal(mask, masks_of(pruned)[name]) for name, mask in masks.items())


def test_mixed_precision(pruned: PreTrainedModel) -> None:
    masks, scaler = masks_of(pruned), torch.amp.GradScaler("cpu", init_scale=2.0**20)  # the first steps overflow
    optimiser = OPTIMISERS["AdamW"](pruned.parameters())
    before = pruned.model.layers[0].mlp.up_proj.weight.clone()
    with besa.keep_masks(pruned):
        for step in range(12):
            optimiser.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = pruned(input_ids=batch(step), labels=batch(step)).loss
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
    assert scaler.get_scale() < 2.0**20
    assert not torch.equal(before, pruned.model.layers[0].mlp.up_proj.weight)
    assert all(torch.equal(mask, masks_of(pruned)[name]) for name, mask in masks.items())


def test_the_model_may_change_its_home(pruned: PreTrainedModel) -> None:
    """It is frozen, as `besa.load` gives it; then it gets another dtype, other parameters, and learns."""
    masks = masks_of(pruned)
    with besa.keep_masks(pruned.requires_grad_(False)) as kept:
        assert not any(weight.requires_grad for weight in pruned.parameters())
        pruned.to(torch.bfloat16).requires_grad_(True)
        train(pruned, OPTIMISERS["AdamW"](pruned.parameters()), steps=1)
        assert not pruned.model.layers[0].mlp.up_proj.weight.grad[masks["model.layers.0.mlp.up_proj.weight"]].any()
        pruned.load_state_dict({name: each.float() for name, each in pruned.state_dict().items()}, assign=True)
        train(pruned, OPTIMISERS["AdamW"](pruned.parameters()), steps=2)
        kept.check()
        assert not pruned.model.layers[0].mlp.up_proj.weight.grad[masks["model.layers.0.mlp.up_proj.weight"]].any()
    assert all(torch.equal(mask, masks_of(pruned)[name]) for name, mask in masks.items())


def test_a_packed_model_is_made_dense_and_trained(folder: Path, tmp_path: Path) -> None:
    besa.pack(folder, tmp_path / "packed")
    stored = (tmp_path / "packed" / "bitmask.safetensors").read_bytes()
    model = besa.load(tmp_path / "packed", device="cpu").dequantize()
    assert all(parameter.requires_grad for parameter in model.parameters())  # as of a model that was loaded dense
    masks = masks_of(besa.load(folder, device="cpu"))
    with besa.keep_masks(model):
        losses, _ = train(model, OPTIMISERS["AdamW"](model.parameters()))
    assert losses[3] < losses[0]
    assert all(torch.equal(mask, masks_of(model)[name]) for name, mask in masks.items())
    model.save_pretrained(tmp_path / "trained")
    again = besa.load(tmp_path / "trained", device="cpu")
    assert all(torch.equal(weight, again.get_parameter(name)) for name, weight in model.named_parameters())
    assert (tmp_path / "packed" / "bitmask.safetensors").read_bytes() == stored


def small(config: type, **sizes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(vocab_size=1024, bos_token_id=0, eos_token_id=0, **sizes))


def test_transposed_linears_and_experts() -> None:
    models = [
        small(GPT2Config, n_embd=32, n_layer=2, n_head=2),
        small(
            MixtralConfig, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=3,
        ),
    ]  # fmt: skip
    assert isinstance(models[0], GPT2LMHeadModel)
    assert isinstance(models[1], MixtralForCausalLM)
    for model, parameters in zip(models, (8, 12), strict=True):
        masks = masks_of(prune(model))
        assert len(masks) == parameters
        with besa.keep_masks(model) as kept:
            train(model, OPTIMISERS["AdamW"](model.parameters()), steps=2)
        assert kept.sparsity == 0.5
        assert all(torch.equal(mask, masks_of(model)[name]) for name, mask in masks.items())


def test_blocks_that_went_still_pass_their_input_on() -> None:
    """Their biases do not learn. One that is not zero beside a matrix of zeros does, and so do all others."""
    sizes = {"num_attention_heads": 2, "attention_bias": True, "mlp_bias": True}
    model = small(LlamaConfig, hidden_size=32, intermediate_size=48, num_hidden_layers=3, **sizes)
    shared = {name: bias for name, bias in model.named_parameters() if name.endswith("bias")}
    with torch.no_grad():
        for number, bias in enumerate(shared.values()):
            bias.normal_(generator=torch.Generator().manual_seed(number))
        for each in model.model.layers[1].modules():
            if isinstance(each, nn.Linear):
                each.weight.zero_()
                each.bias.zero_()
        model.model.layers[0].mlp.up_proj.weight.zero_()
        model.model.layers[2].mlp.gate_proj.bias.zero_()
    before = {name: bias.clone() for name, bias in shared.items()}
    with besa.keep_masks(model) as kept:
        train(model, OPTIMISERS["AdamW"](model.parameters()), steps=2)
        kept.check()
    still = {name for name, bias in shared.items() if torch.equal(bias, before[name])}
    assert still == {name for name in shared if "layers.1." in name}
    matrices = [weight for name, weight in model.named_parameters() if "_proj.weight" in name]
    zeros = sum(int((weight == 0).sum()) for weight in matrices)
    assert kept.sparsity == zeros / sum(weight.numel() for weight in matrices)
    states = model(batch(0), output_hidden_states=True).hidden_states
    assert torch.equal(states[1], states[2])
    assert not torch.equal(states[0], states[1])


def trainer(model: PreTrainedModel, out: Path, steps: int, **settings: object) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in batch(0)]
    arguments = TrainingArguments(
        str(out), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3,
        weight_decay=0.1, save_steps=2, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, seed=1,
        **settings,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[besa.KeepMasks()])


@pytest.mark.parametrize("settings", [{}, {"optim": "adafactor", "bf16": True, "gradient_checkpointing": True}])
def test_a_trainer_keeps_the_zeros_also_when_it_resumes(folder: Path, tmp_path: Path, settings: dict) -> None:
    before = besa.load(folder, device="cpu")
    masks = masks_of(before)
    whole = trainer(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "whole", 4, **settings)
    whole.train()
    log = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert log[-1] < log[0]
    stopped = trainer(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "stopped", 4, **settings)
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "stopped" / "checkpoint-2")
    stopped.train(resume_from_checkpoint=get_last_checkpoint(tmp_path / "stopped"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "stopped" / "checkpoint-4")
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, stopped.model.get_parameter(name))
        assert torch.equal(weight, saved.get_parameter(name))
        if name in masks:
            assert torch.equal(weight == 0, masks[name])
            assert not torch.equal(weight, before.get_parameter(name))
    assert json.loads((tmp_path / "stopped" / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


@pytest.mark.parametrize("wrapped", [False, True])
def test_adapters_are_trained_and_merged(folder: Path, tmp_path: Path, wrapped: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    masks, before = masks_of(model), copy.deepcopy(model.state_dict())
    early = None if wrapped else besa.keep_masks(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    run = trainer(adapted, tmp_path / "lora", 3)
    run.train()
    kept = early or next(each.masks for each in run.callback_handler.callbacks if isinstance(each, besa.KeepMasks))
    kept.check()
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    assert torch.equal(layer.base_layer.weight, before["model.layers.0.mlp.up_proj.weight"])
    delta = layer.get_delta_weight("default")
    assert bool((delta != 0).all())
    merged = adapted.merge_and_unload()
    with pytest.raises(BesaError, match="by a merge"):
        kept.check()
    kept.apply()
    kept.check()
    after = masks_of(merged)
    assert all(torch.equal(mask, after[name]) for name, mask in masks.items())
    expected = (before["model.layers.0.mlp.up_proj.weight"] + delta) * ~masks["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(merged.get_parameter("model.layers.0.mlp.up_proj.weight"), expected)
    if early:
        early.remove()


@pytest.mark.parametrize("adapters", [False, True])
def test_adapters_that_begin_by_changing_the_weights_are_refused(tiny_llama: PreTrainedModel, adapters: bool) -> None:
    config = peft.LoraConfig(target_modules=["up_proj"], init_lora_weights="olora")
    adapted = peft.get_peft_model(prune(tiny_llama), config)
    with pytest.raises(BesaError, match="init_lora_weights='olora', which changes the pruned weights too"):
        besa.keep_masks(adapted, adapters=adapters)


def test_a_second_adapter_need_not_be_on_every_linear(tiny_llama: PreTrainedModel) -> None:
    adapted = peft.get_peft_model(prune(tiny_llama), peft.LoraConfig(target_modules=["up_proj", "down_proj"]))
    adapted.add_adapter("second", peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    adapted.set_adapter("second")
    expected = adapted(batch(5)).logits
    with besa.keep_masks(adapted, adapters=True), torch.no_grad():
        found = adapted(batch(5)).logits
        with adapted.disable_adapter():
            without = adapted(batch(5)).logits
    assert 0 < (found - without).norm() < (expected - without).norm()


@pytest.mark.parametrize("kind", ["linears", "transposed linears"])
def test_adapters_can_be_trained_as_what_they_become(tiny_llama: PreTrainedModel, kind: str) -> None:
    model = prune(tiny_llama if kind == "linears" else small(GPT2Config, n_embd=32, n_layer=2, n_head=2)).eval()
    tokens = batch(5)

    def changed_by_merge(adapters: bool) -> tuple[float, float]:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", fan_in_fan_out=kind != "linears")
        adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
        masks = masks_of(adapted.get_base_model())
        with besa.keep_masks(adapted, adapters=adapters) as kept:
            start = {name: weight.clone() for name, weight in adapted.named_parameters()}
            losses, _ = train(adapted, OPTIMISERS["AdamW"](each for each in adapted.parameters() if each.requires_grad))
            learned = [name for name, each in adapted.named_parameters() if not torch.equal(each, start[name])]
            assert learned
            assert all("lora_" in name for name in learned)
            assert losses[3] < losses[0]
            with torch.inference_mode():
                trained = adapted(tokens).logits
                with adapted.disable_adapter():
                    assert torch.equal(adapted(tokens).logits, model(tokens).logits)
            merged = adapted.merge_and_unload()
            kept.apply()
        for name, mask in masks.items():
            assert "lora_" in name or torch.equal(mask, merged.get_parameter(name.replace(".base_layer", "")) == 0)
        with torch.inference_mode():
            return float((merged(tokens).logits - trained).abs().max()), float(trained.abs().max())

    change, size = changed_by_merge(adapters=True)
    assert change < 1e-5 * size
    change, size = changed_by_merge(adapters=False)
    assert change > 1e-3 * size


def test_what_cannot_be_kept_is_refused(
    folder: Path, tmp_path: Path, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(model: object, sentence: str) -> None:
        with pytest.raises(BesaError, match=sentence) as caught:
            besa.keep_masks(model)
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith(".")

    refused(tiny_llama, "LlamaForCausalLM has no zeros to keep: prune it first")
    sparse = prune(copy.deepcopy(tiny_llama))
    with pytest.raises(BesaError, match=r"no adapters yet: call keep_masks with adapters after peft\.get_peft_model"):
        besa.keep_masks(sparse, adapters=True)
    weighted = peft.get_peft_model(sparse, peft.LoraConfig(target_modules=["up_proj"], use_dora=True))
    with pytest.raises(BesaError, match="up_proj is no plain LoRA of a linear"):
        besa.keep_masks(weighted, adapters=True)
    dropping = peft.get_peft_model(prune(copy.deepcopy(tiny_llama)), peft.LoraConfig(lora_dropout=0.1))
    with pytest.raises(BesaError, match=r"_proj has dropout, .*: set lora_dropout=0"):
        besa.keep_masks(dropping, adapters=True)
    refused(nn.Linear(2, 2), "Linear is no model of transformers")
    refused("model", "keep_masks: model ")
    besa.pack(folder, tmp_path / "packed")
    refused(besa.load(tmp_path / "packed", device="cpu"), r"are packed, .* dense by `model\.dequantize\(\)` first")
    with torch.device("meta"):
        refused(AutoModelForCausalLM.from_config(tiny_llama.config), "has no memory")
    prune(tiny_llama).hf_quantizer = object()
    refused(tiny_llama, "LlamaForCausalLM is quantised")
    del tiny_llama.hf_quantizer
    shard = copy.deepcopy(tiny_llama)
    shard.model.layers[1].mlp.up_proj.weight.data = torch.empty(0)
    refused(shard, r"model\.layers\.1\.mlp\.up_proj is sharded")
    kept = besa.keep_masks(tiny_llama)
    tiny_llama.model.layers[1].mlp.up_proj.weight.data = torch.empty(0)
    with pytest.raises(BesaError, match=r"up_proj\.weight is sharded, or lost its shape"):
        kept.apply()
    kept.remove()
    run = trainer(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "out", 1)
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", object())
    with pytest.raises(BesaError, match="under DeepSpeed or FSDP"):
        run.callback_handler.on_train_begin(run.args, run.state, run.control)
