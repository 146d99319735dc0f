"""What is written of a wrapper whose text decoder was opened alone, as transformers opens Llama 4 and Qwen3.5."""

from types import SimpleNamespace

import pytest
import transformers
from torch import nn

from besa.checkpoint.companions import with_settings
from besa.checkpoint.writer import _about
from besa.methods.recipe import Recipe

WRAPPERS = {"Llama4Config": "num_local_experts", "Qwen3_5MoeConfig": "num_experts"}


@pytest.mark.parametrize("inside", [True, False], ids=["text configuration", "wrapper's configuration"])
@pytest.mark.parametrize("family", WRAPPERS)
def test_a_number_changes_where_the_wrapper_reads_it(family: str, inside: bool) -> None:
    kind, key = getattr(transformers, family), WRAPPERS[family]
    wrapper = kind()
    before = wrapper.to_dict()
    written = with_settings(before, {key: 3}, wrapper.get_text_config() if inside else wrapper)
    assert getattr(kind.from_dict(written).get_text_config(), key) == 3 != getattr(wrapper.get_text_config(), key)
    assert written == before | {"text_config": before["text_config"] | {key: 3}}


def test_linears_of_towers_stay_out_of_the_codes() -> None:
    """They are no modules of the text decoder; compressed-tensors would take them for codes."""
    model = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "lm_head": nn.Linear(2, 2)})
    decoder = SimpleNamespace(model=model, unbuilt=["model.visual.qkv.weight", "model.visual.qkv.bias"])
    block = SimpleNamespace(linears=[SimpleNamespace(name="q_proj")])
    record = SimpleNamespace(recipe={"name": "wanda-int4"}, sparsity=0.5, blocks=[block])
    about = _about(decoder, record, Recipe.load("wanda-int4").quantization.coding, {})
    assert about["quantization_config"]["ignore"] == ["lm_head", "model.visual.qkv"]
