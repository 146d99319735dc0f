"""No stage that moves weights makes a trained model worse on any kind of text than the model is without that stage.

A stage is judged window by window of held-out text: what it does counts as harm if the mean change of the loss is above
zero by more than two of its standard errors.

Shape suffixes: W windows, L tokens of a text.
"""

import copy
import math
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import besa
from besa.data import assets
from besa.data.domains import DOMAINS, held_out
from besa.evaluation.perplexity import perplexity
from besa.methods.recipe import Recipe
from besa.models.bos import bos_token
from besa.models.loading import load_model, load_tokenizer
from besa.models.source import EMBEDDED, locate
from experiments.models import MODELS
from tests.slowly import some_slow

TEXT = f"cross_entropy: {Recipe.load('best').distill.cross_entropy}"
STAGES = {
    "obs": "reconstruction={method: obs}",
    "cg": "reconstruction={method: cg}",
    "admm": "reconstruction={method: admm}",
    "finetune": "finetune={method: adam}",
    "distill": f"distill={{method: kl, {TEXT}}}",
}
TOO_LARGE = {"qwen2.5-coder-1.5b": {"distill": f"distill={{method: kl, learns: norms, {TEXT}}}"}}  # 21 GB for weights


@dataclass
class Judged:
    """A trained model, and what it is judged on: before each stage is the model that Wanda prunes by half."""

    dense: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    calibration: str
    samples: int
    texts: dict[str, str]
    window: int
    windows: int

    def losses(self, *overrides: str) -> dict[str, torch.Tensor]:
        """The mean loss (W,) of every window by text, for the model that is pruned so."""
        model = copy.deepcopy(self.dense)
        recipe = Recipe.load("wanda", 0.5, list(overrides))
        besa.compress(
            model, recipe, self.calibration, tokenizer=self.tokenizer, samples=self.samples, seqlen=self.window
        )
        return {name: self._of_windows(model, text) for name, text in self.texts.items()}

    def _of_windows(self, model: PreTrainedModel, text: str) -> torch.Tensor:
        bos = bos_token("auto", self.tokenizer, model.config)
        tokens_L = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        parts = tokens_L.split(self.window - (bos is not None))[: self.windows]
        losses = [math.log(perplexity(model, part, self.window, bos=bos).perplexity) for part in parts]
        return torch.tensor(losses, dtype=torch.float64)

    @cached_property
    def before(self) -> dict[str, torch.Tensor]:
        return self.losses()

    def harm(self, *overrides: str) -> dict[str, str]:
        """What the stage of these overrides changes, by text that it harms; it does change something."""
        harmed, after = {}, self.losses(*overrides)
        assert any(not torch.equal(after_W, self.before[name]) for name, after_W in after.items())
        for name, after_W in after.items():
            change_W = after_W - self.before[name]
            mean, error = float(change_W.mean()), float(change_W.std() / math.sqrt(len(change_W)))
            if mean > 2 * error:
                harmed[name] = f"perplexity {100 * math.expm1(mean):+.1f} % ± {100 * error:.1f}"
        return harmed


@pytest.fixture(scope="module")
def tiny(pristine_tiny_llama, tiny_tokenizer, tiny_llama_folder, tmp_path_factory):
    """The tiny Llama: calibrated on one half of its web text, judged on the other and on an encyclopedia."""
    web, wiki = ((tiny_llama_folder / f"{name}.txt").read_text(encoding="utf-8") for name in ("calibration", "heldout"))
    half = tmp_path_factory.mktemp("text") / "web.txt"
    half.write_text(web[: len(web) // 2], encoding="utf-8")
    texts = {"web": web[len(web) // 2 :], "encyclopedia": wiki}
    return Judged(pristine_tiny_llama, tiny_tokenizer, str(half), 16, texts, window=128, windows=24)


@pytest.mark.parametrize("stage", some_slow(STAGES, {"admm", "finetune"}))
def test_the_tiny_model(stage, tiny):
    assert tiny.harm(STAGES[stage]) == {}


def test_harm_is_seen(tiny):
    assert set(tiny.harm("allocation={method: nm}")) == {"web", "encyclopedia"}


@pytest.fixture(scope="module", params=[EMBEDDED, *MODELS])
def trained(request):
    """A trained model, calibrated on a mixture and judged on every domain."""
    name = request.param
    folder = assets.cache_dir() / "models" / name
    if name != EMBEDDED and not folder.is_dir():
        pytest.skip(f"{name} is not there: python -m experiments.models {name} makes it")
    source = locate(name if name == EMBEDDED else str(folder)).local()
    texts = {domain: "\n\n".join(held_out(domain)) for domain in DOMAINS}
    return name, Judged(load_model(source).bfloat16(), load_tokenizer(source), "mix", 16, texts, window=128, windows=8)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_trained_models(stage, trained):
    name, judged = trained
    assert judged.harm(TOO_LARGE.get(name, {}).get(stage, STAGES[stage])) == {}


@pytest.mark.parametrize("dtype", some_slow(["float32", "bfloat16"], {"bfloat16"}))
def test_fine_tuning_learns_in_every_dtype(dtype, tiny_llama_folder):
    """Float32 is multiplied in bfloat16 where the hardware does that, and the numbers that learn stay float32."""
    text = str(tiny_llama_folder / "calibration.txt")
    recipe = Recipe.load("wanda", 0.5, ["finetune={method: adam, epochs: 1}"])
    record = besa.compress(tiny_llama_folder, recipe, text, samples=16, seqlen=64, dtype=dtype, device="cpu").record
    assert record.blocks[0].finetuning[-1] < 0.95 * record.blocks[0].finetuning[0]
    assert all(block.finetuning[-1] < block.finetuning[0] for block in record.blocks)
