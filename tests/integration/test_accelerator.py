"""The whole program on a device that is not the CPU: the same bits, few syncs, few launches, few bytes that travel."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import besa
from besa import BesaError, Recipe, compress
from besa.errors import Interrupted
from besa.methods.allocation import Besa
from besa.methods.allocation.changing import ChangingLinears
from besa.methods.allocation.descent import Descent
from besa.methods.allocation.problem import BlockProblem
from besa.methods.finetuning import Finetuned, MaskedAdam
from besa.methods.shipped import shipped
from besa.models.blocks import send
from besa.pruning import loop, step
from tests import pretend
from tests.bit_equality import VARIANTS
from tests.integration.test_families import TOKENS, config_of, different, random_model, saved
from tests.slowly import some_slow

pytestmark = pytest.mark.usefixtures("torchs_own_products")
TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
TEXT = str(TINY / "calibration.txt")
BLOCKS, LINEARS = 2, 7
SETTINGS: dict[str, Any] = {"samples": 8, "seqlen": 37, "batch": 4, "dtype": "bfloat16"}
FEW_STEPS = ["allocation.steps=17", "allocation.tolerance=0"]
MORE = {
    "mixed 2-of-4": ("fast", ["allocation.method=nm", "allocation.mixed=true", "targets.method=uniform"]),
    "int4 groups": ("besa-int4", ["quantization.group=32"]),
    "probability": ("besa", ["allocation.mask=probability"]),
    "distilled": ("wanda", ["distill={method: kl, learns: together, epochs: 1, rate: 0.003}"]),
}
BATCH = 4 * 37 * 96 * 2  # bytes of the hidden states of a batch; nothing else has this size
CASES = {name: (name, []) for name in shipped()} | VARIANTS | MORE
OF_EXPERTS = {"fewer experts": ("fast", ["experts.method=reap"])}
LIKE_OTHERS = {  # of parts that faster cases have, too
    "besa-attn-mlp", "besa-int4", "besa-layer-pruned-teacher", "besa-layerwise", "besa-rtn4", "besa-two-blocks", "best",
    "best-int4", "best-int8", "depth", "distilled", "int4", "int4 groups", "magnitude", "mixed 2-of-4", "owl",
    "probability", "ria", "sparsegpt", "structured", "wanda-int4",
}  # fmt: skip


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first blocks of the tiny Llama, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "shallow"
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model.model.layers = model.model.layers[:BLOCKS]
    model.config.num_hidden_layers = BLOCKS
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def counted_anew() -> None:
    pretend.reset()
    pretend.memory.free = pretend.MEMORY


def recipe_of(case: str) -> Recipe:
    name, changes = (CASES | OF_EXPERTS)[case]
    recipe = Recipe.load(name, overrides=changes)
    return Recipe.load(name, overrides=[*changes, *FEW_STEPS]) if isinstance(recipe.allocation, Besa) else recipe


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def decisions_of(folder: Path) -> list[dict[str, Any]]:
    """What the record says of each block, and of distilling, but for the time it took."""
    record = json.loads((folder / "besa_run.json").read_text())
    parts = [*record["blocks"], record["distilling"] or {}]
    return [{key: value for key, value in part.items() if key not in ("seconds", "phases")} for part in parts]


def assert_same_on_both(model: Path, recipe: Recipe, tmp_path: Path, **changes: Any) -> None:
    settings = {"calibration": TEXT} | SETTINGS | changes
    for device in ("cpu", "pretend"):
        compress(model, recipe, out=tmp_path / device, device=device, **settings)
    assert pretend.counts.launches.total() > 1000  # it really ran there
    assert weights_of(tmp_path / "cpu") == weights_of(tmp_path / "pretend")
    assert decisions_of(tmp_path / "cpu") == decisions_of(tmp_path / "pretend")


# Equal to the CPU


@pytest.mark.parametrize("case", some_slow(CASES, LIKE_OTHERS))
def test_every_method_gives_the_bits_of_the_cpu(shallow: Path, tmp_path: Path, case: str) -> None:
    assert_same_on_both(shallow, recipe_of(case), tmp_path)


@pytest.mark.parametrize("dtype", some_slow(["float32", "float16"], {"float32"}))
def test_every_dtype_does(shallow: Path, tmp_path: Path, dtype: str) -> None:
    # Without autocast, which the pretend accelerator lacks.
    recipe = Recipe.load("besa", overrides=["allocation.autocast=false", *FEW_STEPS])
    assert_same_on_both(shallow, recipe, tmp_path, dtype=dtype)


@pytest.mark.parametrize("recipe", some_slow(["besa", "best"], {"best"}))
def test_experts_do(tiny_tokenizer: Any, tmp_path: Path, recipe: str) -> None:
    folder = saved(random_model(config_of("mixtral")), tmp_path / "mixtral")
    assert_same_on_both(folder, recipe_of(recipe), tmp_path, calibration=TOKENS, tokenizer=tiny_tokenizer)


@pytest.mark.slow
def test_whole_experts_go_there_too(tiny_tokenizer: Any, tmp_path: Path) -> None:
    folder, recipe = saved(random_model(config_of("mixtral")), tmp_path / "mixtral"), recipe_of("fewer experts")
    assert_same_on_both(folder, recipe, tmp_path, calibration=TOKENS, tokenizer=tiny_tokenizer)
    in_memory = [random_model(config_of("mixtral")) for _ in range(2)]
    for model, device in zip(in_memory, ("cpu", "pretend"), strict=True):
        compress(model, recipe, TOKENS, tokenizer=tiny_tokenizer, device=device, batch=4)
    assert different(*in_memory) == set()


@pytest.mark.slow
def test_hidden_states_that_do_not_fit_stay_on_the_host_or_in_files(shallow: Path, tmp_path: Path) -> None:
    recipe = recipe_of("besa")
    compress(shallow, recipe, TEXT, out=tmp_path / "fits", device="pretend", **SETTINGS)
    assert BATCH not in pretend.counts.to_host
    for name, changes in {"host": {}, "file": {"activation_budget": 1000}}.items():
        pretend.memory.free = 1000 if name == "host" else pretend.MEMORY
        pretend.reset()
        compress(shallow, recipe, TEXT, out=tmp_path / name, device="pretend", **SETTINGS | changes)
        assert weights_of(tmp_path / "fits") == weights_of(tmp_path / name)
        assert pretend.counts.to_host.count(BATCH) >= 2 * BLOCKS


@pytest.mark.slow
@pytest.mark.parametrize("case", ["besa", "fast"])
def test_a_run_that_was_stopped_goes_on_there(shallow: Path, tmp_path: Path, case: str) -> None:
    def stop(done: int, _: int, state: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    compress(shallow, recipe_of(case), TEXT, out=tmp_path / "whole", device="pretend", **SETTINGS)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        compress(shallow, recipe_of(case), TEXT, out=tmp_path / "stopped", device="pretend", progress=stop, **SETTINGS)
    with pytest.raises(BesaError, match="device"):
        compress(shallow, recipe_of(case), TEXT, out=tmp_path / "stopped", device="cpu", resume=True, **SETTINGS)
    compress(shallow, recipe_of(case), TEXT, out=tmp_path / "stopped", device="pretend", resume=True, **SETTINGS)
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "stopped")
    assert decisions_of(tmp_path / "whole") == decisions_of(tmp_path / "stopped")


def test_a_model_in_memory_is_pruned_there_and_comes_home(shallow: Path) -> None:
    pruned = {}
    for device in ("cpu", "pretend"):
        model = AutoModelForCausalLM.from_pretrained(shallow, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(shallow)
        compress(model, recipe_of("besa"), TEXT, tokenizer=tokenizer, device=device, **SETTINGS)
        assert model.device.type == "cpu"
        pruned[device] = model.state_dict()
    assert all(torch.equal(tensor, pruned["pretend"][name]) for name, tensor in pruned["cpu"].items())


def test_models_are_evaluated_there(shallow: Path) -> None:
    settings: dict[str, Any] = {"window": 64, "max_windows": 6, "batch": 3, "dtype": "bfloat16"}
    settings |= {"tasks": ["arc_easy", "piqa"], "limit": 6}
    on_cpu, there = [
        besa.evaluate(shallow, [str(TINY / "heldout.txt")], device=device, **settings) for device in ("cpu", "pretend")
    ]
    assert on_cpu.details == there.details
    assert on_cpu.zero_shot == there.zero_shot
    assert pretend.counts.launches.total() > 100


def test_dense_and_packed_models_write_text_there(shallow: Path, tmp_path: Path) -> None:
    compress(shallow, "wanda", TEXT, out=tmp_path / "pruned", device="cpu", **SETTINGS)
    besa.pack(tmp_path / "pruned", tmp_path / "packed")
    written = {
        (folder, device): besa.generate(tmp_path / folder, "The city of", max_new_tokens=12, device=device)
        for folder in ("pruned", "packed")
        for device in ("cpu", "pretend")
    }
    assert len(set(written.values())) == 1
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"), AutoTokenizer.from_pretrained(shallow)
    pretend.reset()
    lent = besa.generate(model, "The city of", max_new_tokens=12, tokenizer=tokenizer, device="pretend")
    assert {lent} == {*written.values()}
    assert pretend.counts.launches.total() > 100
    assert model.device == torch.device("cpu")
    tokens_NT = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        dense_NTV = besa.load(tmp_path / "pruned", device="cpu")(tokens_NT).logits
        packed_NTV = besa.load(tmp_path / "packed", device="pretend")(tokens_NT.to("pretend")).logits.cpu()
    torch.testing.assert_close(packed_NTV, dense_NTV, rtol=2e-2, atol=2e-2)


# What a GPU would wait for


@dataclass
class Watched:
    """What was seen of a run.

    Attributes:
        passes: host syncs of every pass over hidden states.
        learning: steps, host syncs and launches of every descent, without the launches of the block itself.
        tuning: looks at the held-out loss, and host syncs, of every fine-tuning.
        host: floating-point work of the host while a unit is pruned.
    """

    passes: list[int] = field(default_factory=list)
    learning: list[tuple[int, int, int]] = field(default_factory=list)
    tuning: list[tuple[int, int]] = field(default_factory=list)
    host: list[Counter[str]] = field(default_factory=list)


def watched(model: PreTrainedModel, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Prune a model in memory on the pretend accelerator, and watch."""
    seen = Watched()
    descend, error, tune, prune_unit = Descent.descend, BlockProblem.error, MaskedAdam.tune, step.prune_unit

    def sending(*args: Any, **kwargs: Any) -> None:
        before = pretend.counts.syncs.total()
        send(*args, **kwargs)
        seen.passes.append(pretend.counts.syncs.total() - before)

    def descending(self: Descent, problem: BlockProblem, parts: list[ChangingLinears], constant: Any) -> list[float]:
        launches, syncs = pretend.counts.launches.total(), pretend.counts.syncs.total()
        losses = descend(self, problem, parts, constant)
        launches, syncs = pretend.counts.launches.total() - launches, pretend.counts.syncs.total() - syncs
        # The same forward and backward passes alone.
        leaves = {name: w_OI.detach().clone().requires_grad_() for part in parts for name, w_OI in part.weights.items()}
        before = pretend.counts.launches.total()
        error(problem, 0, self.tokens(37), constant | leaves, self.plain).backward()
        own = pretend.counts.launches.total() - before
        seen.learning.append((len(losses), syncs, launches - own * len(losses)))
        return losses

    def tuning(*args: Any) -> Finetuned:
        before = pretend.counts.syncs.total()
        tuned = tune(*args)
        seen.tuning.append((len(tuned.losses), pretend.counts.syncs.total() - before))
        return tuned

    def pruning(*args: Any) -> Any:
        with pretend.host_floats() as work:
            result = prune_unit(*args)
        seen.host.append(work)
        return result

    with monkeypatch.context() as patch:
        for module in ("besa.models.blocks", "besa.models.units", "besa.methods.targets.search"):
            patch.setattr(f"{module}.send", sending)
        patch.setattr(Descent, "descend", descending)
        patch.setattr(MaskedAdam, "tune", tuning)
        patch.setattr(loop, "prune_unit", pruning)
        tokenizer = AutoTokenizer.from_pretrained(TINY)
        compress(model, recipe, TEXT, tokenizer=tokenizer, device="pretend", **SETTINGS | {"samples": 16})
    return seen


@pytest.mark.parametrize(
    "case",
    some_slow(
        ["besa", "besa-int4", "besa-layerwise", "best", "fast", "int4", "sparsegpt", "wanda"],
        {"besa", "besa-int4", "besa-layerwise", "best", "int4", "sparsegpt"},
    ),
)
def test_the_host_neither_waits_nor_computes_more_than_it_may(shallow: Path, monkeypatch: Any, case: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(shallow, dtype=torch.bfloat16)
    blocks = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    outside = sum(parameter.nbytes for parameter in model.parameters()) - blocks
    recipe = recipe_of(case)
    seen = watched(model, recipe, monkeypatch)

    assert len(seen.passes) >= 2 * BLOCKS
    assert max(seen.passes) <= 1
    assert len(seen.learning) == (BLOCKS if recipe.descent else 0)
    for steps, syncs, launches in seen.learning:
        assert steps >= 16
        assert syncs <= steps / 16 + 1
        assert launches <= 12 * LINEARS * steps, f"{launches / steps / LINEARS:.1f} for each linear and step"
    assert len(seen.tuning) == (BLOCKS if recipe.finetune.moves_weights else 0)
    for looks, syncs in seen.tuning:  # 15 learning steps between two looks
        assert syncs == looks + 1  # and the sizes of the weights, at the start
    assert len(seen.host) == BLOCKS
    assert not seen.host[-1]  # the first unit also makes the rates that all begin with

    # Weights go there once and come back once; those of the dense model also go there to be measured.
    small = 60_000 * BLOCKS  # arguments of calls, random bits, numbers of the record
    opened = 1 if recipe.targets.measuring is None else 4  # Fisher's two ways, the search, the run
    distilled = blocks if recipe.distill.moves_weights else 0
    embeddings = 4 if recipe.distill.moves_weights else 3  # and for the sequences to distil on
    assert sum(pretend.counts.to_device) <= opened * blocks + distilled + embeddings * outside + small
    assert sum(pretend.counts.to_host) <= blocks + distilled + small
    assert BATCH not in pretend.counts.to_host
    assert BATCH not in pretend.counts.to_device


# The pretend accelerator itself


def test_a_tensor_in_the_wrong_place_is_an_error() -> None:
    there, here = torch.ones(3).to("pretend"), torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(RuntimeError, match="same device"):
        there[torch.tensor([0, 1])]
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert (there + 1).tolist() == [2, 2, 2]


def test_launches_syncs_and_bytes_are_counted() -> None:
    there = torch.ones(4, 8).to("pretend")
    assert pretend.counts.to_device == [128]
    pretend.reset()
    whole = (there.t()[0] * 2).sum()
    assert pretend.counts.launches == Counter({"aten::mul": 1, "aten::sum": 1})
    assert not pretend.counts.syncs
    assert float(whole) == 8
    assert bool((there == 1).all())
    assert there.nonzero().shape == (32, 2)
    assert there[there > 0].shape == (32,)
    assert pretend.counts.syncs.total() >= 4
    pretend.reset()
    there.cpu()
    assert pretend.counts.to_host == [128]
    assert pretend.counts.syncs.total() == 1
    pretend.reset()
    there.to("cpu", non_blocking=True)
    assert not pretend.counts.syncs


def test_work_of_the_host_is_seen() -> None:
    there = torch.ones(200).to("pretend")
    with pretend.host_floats() as work:
        there * 2
        torch.arange(200).sum()
    assert not work
    with pretend.host_floats() as work:
        torch.ones(200).sum()
    assert work == Counter({"aten::ones": 200, "aten::sum": 200})
