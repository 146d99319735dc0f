"""Packed checkpoints in vLLM. Its engine is no dependency of the tests: what needs it is skipped where it is absent.

To run all of it, install vLLM beside besa. A build for CUDA runs all but the engine where there is no GPU; a build for
the CPU runs the engine too.
"""

import json
import os
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import besa
from besa import BesaError
from besa.storage.weights import WeightFiles

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "assets" / "tiny-llama"
PROMPTS = ["The city lies on the river", "Once", "In the north of the country there"]
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

ENGINE = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    folder, load_format, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    small = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 4}
    engine = LLM(folder, load_format=load_format, dtype="float32", **small)
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=24, logprobs=0))
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    chosen = [[step[token].logprob for step, token in zip(o.outputs[0].logprobs, t)] for o, t in zip(outputs, tokens)]
    print("RESULT", json.dumps([tokens, chosen]))
"""


def engine(folder: Path, load_format: str) -> subprocess.CompletedProcess[str]:
    """vLLM's engine in a process of its own, as it starts others."""
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", ENGINE, str(folder), load_format, json.dumps(PROMPTS)],
        env={**os.environ, **settings}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["wanda", "wanda-int4"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pruned checkpoint and the same packed, with heads as wide as vLLM's kernels need."""
    place = tmp_path_factory.mktemp("vllm")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
            dtype="float32",
        )
    )  # fmt: skip
    model.save_pretrained(place / "model")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(place / "model")
    sizes = {"samples": 2, "seqlen": 16}
    besa.compress(place / "model", request.param, str(TINY / "calibration.txt"), out=place / "dense", **sizes)
    besa.pack(place / "dense", place / "packed")
    return place / "dense", place / "packed"


@pytest.mark.slow
def test_only_vllm_imports_the_plugin(tmp_path: Path) -> None:
    plugin = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    assert plugin == {"besa": "besa.integrations.vllm:register"}
    (tmp_path / "vllm.py").write_text("raise SystemExit('besa imported vLLM')")
    modules = [
        ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "src" / "besa").rglob("*.py"))
        if path.stem not in ("vllm", "__main__") and "gpu" not in path.parts
    ]
    program = f"import importlib\nfor name in {modules}: importlib.import_module(name)"
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert run.returncode == 0


@needs_vllm
def test_vllm_finds_the_loader_and_the_layers(pair: tuple[Path, Path]) -> None:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.model_loader import get_model_loader

    from besa.integrations import vllm as plugin

    plugin.register()
    plugin.register()
    assert get_quantization_config("besa") is plugin.PackedConfig
    assert type(get_model_loader(LoadConfig(load_format="besa"))) is plugin.PackedLoader
    settings = json.loads((pair[1] / "config.json").read_text())["quantization_config"]
    config = plugin.PackedConfig.from_config(settings)
    assert type(config) is (plugin.PackedCodesConfig if "codes" in settings else plugin.PackedConfig)
    assert {torch.float32, torch.bfloat16} <= set(config.get_supported_act_dtypes())


@needs_vllm
def test_the_loader_gives_the_tensors_that_were_packed(pair: tuple[Path, Path]) -> None:
    from vllm.config.load import LoadConfig

    from besa.integrations.vllm import PackedLoader

    def read(folder: Path, quantization: str | None = "besa", **model: object) -> dict[str, torch.Tensor]:
        loader = PackedLoader(LoadConfig(load_format="besa"))
        config = SimpleNamespace(model=str(folder), revision=None, quantization=quantization)
        loader.download_model(config)
        return dict(loader.get_all_weights(config, SimpleNamespace(**model)))

    dense, packed = pair
    found, files = read(packed), WeightFiles(dense)
    expected = dict(files.read(files.names))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(BesaError, match="is not packed: leave out --load-format besa"):
        read(dense)
    with pytest.raises(BesaError, match="needs weights of a second checkpoint"):
        read(packed, secondary_weights=("other",))
    if "codes" in json.loads((packed / "config.json").read_text())["quantization_config"]:
        with pytest.raises(BesaError, match="was packed by an older besa"):
            read(packed, quantization=None)


@needs_vllm
@pytest.mark.slow
def test_the_engine_serves_a_packed_checkpoint(pair: tuple[Path, Path]) -> None:
    """The tokens and log probabilities of transformers, for weights of float32; codes need bfloat16 on a CPU."""
    from vllm.platforms import current_platform

    if current_platform.is_unspecified():
        pytest.skip("this build of vLLM has no device here")
    dense, packed = pair
    if "codes" in json.loads((packed / "config.json").read_text())["quantization_config"]:
        pytest.skip("vLLM's kernels for codes on a CPU need bfloat16, in which no tokens can be compared")
    run = engine(packed, "besa")
    assert "RESULT" in run.stdout, run.stdout[-3000:] + run.stderr[-3000:]
    tokens, chosen = json.loads(run.stdout.partition("RESULT")[2].splitlines()[0])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(dense), AutoTokenizer.from_pretrained(dense)
    for prompt, made, logarithms in zip(PROMPTS, tokens, chosen, strict=True):
        asked = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = model(torch.cat([asked, torch.tensor([made])], dim=1)).logits[0, asked.shape[1] - 1 : -1]
        assert logits.argmax(-1).tolist() == made
        expected = logits.log_softmax(-1).gather(1, torch.tensor(made)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logarithms), expected, rtol=0, atol=1e-4)
    for folder, load_format, sentence in (
        (packed, "auto", "start vLLM with --load-format besa, or `besa unpack` it."),
        (dense, "besa", "is not packed: leave out --load-format besa."),
    ):
        refused = engine(folder, load_format)
        assert refused.returncode != 0
        assert sentence in refused.stdout + refused.stderr
