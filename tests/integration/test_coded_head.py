"""Head and embeddings in codes of eight bits: packed, loaded in all ways, unpacked, and refused."""

import copy
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import besa
from besa import BesaError
from besa.checkpoint import packing
from besa.models.limits import embedding_rows
from besa.runtime.coded import CodedEmbedding, CodedLinear
from besa.runtime.speed import step_bytes
from besa.storage.formats import row_codes
from besa.storage.formats.container import Container
from tests.slowly import some_slow
from tests.sweep import small_model

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
TEXT = str(TINY / "calibration.txt")
WEIGHTS = "bitmask.safetensors"
SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0,
         "eos_token_id": 0, "pad_token_id": 1}  # fmt: skip
FORMS = ["tied", "codes", "own head", "scaled"]
TOKENS = torch.arange(2, 42).view(2, -1)


def dense(form: str, folder: Path) -> Path:
    torch.manual_seed(0)
    if form in ("tied", "codes"):
        besa.compress(TINY, "wanda" if form == "tied" else "wanda-int4", TEXT, out=folder, samples=2, seqlen=16)
        return folder
    if form == "own head":
        model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False, dtype="float32"))
    else:  # the family's own embedding multiplies its rows
        model = Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, dtype="float32"))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder for each form, with `dense` and `packed` in it."""

    @cache
    def make(form: str) -> Path:
        folder = tmp_path_factory.mktemp(form.replace(" ", "-"))
        besa.pack(dense(form, folder / "dense"), folder / "packed", head="int8")
        return folder

    return make


@pytest.fixture(params=some_slow(FORMS, {"scaled", "tied"}))
def checkpoint(request: pytest.FixtureRequest, made: Callable[[str], Path]) -> Path:
    return made(request.param)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(TOKENS).logits


def test_unpacking_gives_the_numbers_of_the_codes_and_all_else_to_the_bit(checkpoint: Path, tmp_path: Path) -> None:
    besa.unpack(checkpoint / "packed", tmp_path / "again")
    before, after = (
        load_file(next(folder.glob("*.safetensors"))) for folder in (checkpoint / "dense", tmp_path / "again")
    )
    assert before.keys() == after.keys()
    ends = {name for name in before if "embed_tokens" in name or "lm_head" in name}
    assert len(ends) == (2 if checkpoint.name.startswith("own-head") else 1)
    for name, tensor in before.items():
        assert torch.equal(after[name], row_codes.pack(tensor).unpack() if name in ends else tensor), name
    configs = [
        json.loads((folder / "config.json").read_text()) for folder in (checkpoint / "dense", tmp_path / "again")
    ]
    assert configs[0] | {"besa": configs[0].get("besa", {}) | {"head": "int8"}} == configs[1]
    files = Container(checkpoint / "packed")
    assert dict(files.shapes()) == {name: tuple(tensor.shape) for name, tensor in before.items()}
    assert files.coded == sorted(name.removesuffix(".weight") for name in ends)


def test_it_computes_what_the_unpacked_checkpoint_does(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    besa.unpack(checkpoint / "packed", tmp_path / "again")
    own, expected = besa.load(checkpoint / "packed"), logits(besa.load(tmp_path / "again"))
    assert isinstance(own.get_input_embeddings(), CodedEmbedding)
    assert isinstance(own.get_output_embeddings(), CodedLinear)
    with monkeypatch.context() as patch:  # asked for each answer of a task: no matrix is made dense for it
        patch.delattr(row_codes.RowCodes, "unpack")
        assert embedding_rows(own) == own.config.vocab_size
    torch.testing.assert_close(logits(own), expected, rtol=1e-4, atol=1e-4)
    off = (logits(own) - logits(besa.load(checkpoint / "dense"))).abs().max()
    assert 0 < off < 0.03 * expected.abs().max()
    plain, info = AutoModelForCausalLM.from_pretrained(checkpoint / "packed", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(plain), logits(own))
    assert torch.equal(logits(copy.deepcopy(plain)), logits(own))
    assert own.generate(TOKENS[:1], max_new_tokens=4, do_sample=False).shape == (1, TOKENS.shape[1] + 4)
    inner = AutoModel.from_pretrained(checkpoint / "packed")
    hidden = own.base_model(TOKENS).last_hidden_state
    assert torch.equal(inner(TOKENS).last_hidden_state, hidden)


def test_in_another_dtype_and_dense_again(checkpoint: Path, tmp_path: Path) -> None:
    besa.unpack(checkpoint / "packed", tmp_path / "again")
    expected = logits(besa.load(tmp_path / "again"))
    half = besa.load(checkpoint / "packed", dtype="bfloat16")
    assert half.get_output_embeddings().matrix.dtype == torch.bfloat16
    assert half.get_output_embeddings().matrix.codes_OI.dtype == torch.int8
    assert (logits(half).float() - expected).abs().max() < 0.05 * expected.abs().max()
    again = AutoModelForCausalLM.from_pretrained(checkpoint / "packed").dequantize()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    ends = again.get_input_embeddings(), again.get_output_embeddings()
    assert isinstance(ends[0], nn.Embedding)
    assert type(ends[1]) is nn.Linear
    assert (ends[0].weight is ends[1].weight) == again.config.tie_word_embeddings
    again.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(again))


def test_a_loaded_model_is_saved_packed(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "packed")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "besa_run.json").write_text("of what was here before")
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "besa_run.json").exists()
    before, after = (load_file(folder / WEIGHTS) for folder in (checkpoint / "packed", tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(besa.load(tmp_path / "saved")), logits(model))


def test_codes_are_mapped_from_their_file_and_shared_by_tied_ends(made: Callable[[str], Path]) -> None:
    model = besa.load(made("tied") / "packed")
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.matrix.codes_OI is embeddings.matrix.codes_OI
    assert "lm_head.weight_codes" not in model.state_dict()
    plain = besa.load(made("tied") / "dense")
    before, after = plain.get_input_embeddings().weight.nbytes, head.matrix.nbytes
    besa.pack(made("tied") / "dense", (folder := made("tied")) / "without")
    assert step_bytes(besa.load(folder / "without")) - step_bytes(model) == before - after
    own = besa.load(made("own head") / "packed")
    rest = sum(tensor.nbytes for tensor in (*own.parameters(), *own.buffers()))
    assert step_bytes(own) == rest - own.get_input_embeddings().matrix.nbytes


def test_what_packing_says(made: Callable[[str], Path], tmp_path: Path) -> None:
    found = besa.pack(made("tied") / "dense", tmp_path / "packed", head="int8")
    rows, columns = 768, 128
    tensor = load_file(made("tied") / "dense" / "model.safetensors")["model.embed_tokens.weight"]
    rows, columns = tensor.shape
    assert (found.head_dense_bytes, found.head_bytes) == (4 * rows * columns, rows * columns + 4 * rows)
    half = besa.pack(made("tied") / "dense", tmp_path / "half", head="int8", dtype="bfloat16")
    assert half.head_bytes == rows * columns + 2 * rows
    rounded = load_file(tmp_path / "half" / WEIGHTS)
    assert torch.equal(rounded["model.embed_tokens.weight_codes"], row_codes.pack(tensor.bfloat16()).codes_OI)
    besa.pack(made("tied") / "dense", tmp_path / "same")
    besa.load(tmp_path / "packed").save_pretrained(tmp_path / "saved")
    for name in ("packed", "same", "saved"):
        besa.unpack(tmp_path / name, tmp_path / f"{name} again")
    cards = {path.parent.name: path.read_text() for path in tmp_path.glob("*/README.md")}
    assert cards.keys() >= {"same", "same again"}
    said = {name for name, card in cards.items() if "| head and embeddings | rounded to 8 bits" in card}
    assert said - {"half"} == {"packed", "packed again", "saved again"}


EMBED = "model.embed_tokens"


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [  # the scales of other codes show which dtype those of the head should have
        ("weight_scale", None, "lacks model.embed_tokens.weight_scale"),
        ("weight_scale", lambda scales: -scales, "not all positive"),
        ("weight_scale", lambda scales: scales.half(), "scales of .* are .*, others"),
        ("weight_codes", lambda codes: codes.int(), "do not fit"),
        ("weight_codes", lambda codes: codes[1:].clone(), "do not fit"),
        ("weight_codes", None, "lacks the weight"),
    ],
)
def test_damage_is_refused(
    key: str,
    change: Callable[[torch.Tensor], torch.Tensor] | None,
    says: str,
    made: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(made("codes") / "packed", tmp_path / "damaged")
    tensors = load_file(folder / WEIGHTS)
    tensor = tensors.pop(f"{EMBED}.{key}")
    if change is not None:
        tensors[f"{EMBED}.{key}"] = change(tensor)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    for action in (lambda: besa.unpack(folder, tmp_path / "out"), lambda: besa.load(folder)):
        with pytest.raises(BesaError, match=says):
            action()


def test_a_head_that_is_renamed_by_its_whole_name_stays_as_it_is(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would not find its codes; what was packed before this was refused would have random ones."""
    for part in (small_model("deepseek_v4"), tiny_tokenizer):
        part.save_pretrained(tmp_path / "dense")
    with pytest.raises(BesaError, match=r"would not find those of head\.weight, which it renames"):
        besa.pack(tmp_path / "dense", tmp_path / "packed", head="int8")
    monkeypatch.setattr(packing, "_found", lambda *names: True)
    besa.pack(tmp_path / "dense", tmp_path / "packed", head="int8")
    with pytest.raises(BesaError, match=r"head\.weight_codes has no place in the model"):
        besa.load(tmp_path / "packed")


def test_an_offloaded_matrix_is_refused(made: Callable[[str], Path]) -> None:
    """Its steps would be on the meta device, where torch multiplies without a word."""
    model = AutoModelForCausalLM.from_pretrained(made("tied") / "packed")
    offloaded = cpu_offload(model, torch.device("cpu"))
    with pytest.raises(BesaError, match="Packed weights cannot be offloaded"):
        offloaded(TOKENS)


def test_numbers_without_a_step_are_refused(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False))
    model.lm_head.weight.data[3, :2] = torch.tensor([3e38, -3e38])
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(BesaError, match=r"^lm_head\.weight has numbers that are too large for codes of eight bits"):
        besa.pack(tmp_path / "model", tmp_path / "packed", head="int8")
    assert not (tmp_path / "packed").exists()


def test_refusals(made: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(BesaError, match="head should be same or int8"):
        besa.pack(made("tied") / "dense", tmp_path / "out", head="int4")
    with pytest.raises(BesaError, match="packed already"):
        besa.pack(made("tied") / "packed", tmp_path / "out", head="int8")
    model = besa.load(made("tied") / "packed")
    with pytest.raises(BesaError, match="compute no gradients"):
        model.lm_head(torch.zeros(1, model.config.hidden_size, requires_grad=True))
    assert list(tmp_path.iterdir()) == []


def test_positions_are_not_coded(tmp_path: Path) -> None:
    """GPT-2's linears are transposed, so that nothing else of it is packed."""
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 64}
    GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "dense")
    besa.pack(tmp_path / "dense", tmp_path / "packed", head="int8")
    assert [name.rpartition(".")[2] for name in Container(tmp_path / "packed").coded] == ["wte"]
    model = besa.load(tmp_path / "packed")
    assert isinstance(model.transformer.wpe, nn.Embedding)
    assert (logits(model) - logits(besa.load(tmp_path / "dense"))).abs().max() < 0.05


def test_embeddings_with_a_norm_of_their_own_stay_as_they_are(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """As of Inkling: transformers would not find the norm beside codes, and make a new one."""
    model = small_model("inkling_text")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight[:, 8:] = 0
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    with pytest.raises(BesaError, match="as this model has a InklingNormedEmbedding: leave out --head"):
        packing.pack(tmp_path / "dense", tmp_path / "coded", head="int8")
    packing.pack(tmp_path / "dense", tmp_path / "packed")
    tokens_NT = torch.arange(24).view(2, 12)
    expected, found = (besa.load(tmp_path / name)(tokens_NT).logits for name in ("dense", "packed"))
    assert torch.allclose(found, expected, atol=1e-5)
