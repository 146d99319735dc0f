"""Whole runs with the GPU's kernels in Triton's interpreter, behind the pretend device, against the CPU's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

import besa
from besa import Recipe
from tests import pretend
from tests.slowly import some_slow

pytest.importorskip("triton")
KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
FEW = ["allocation.steps=2", "allocation.autocast=false"]
RUNS = {
    "sparsegpt": [],
    "sparsegpt in 2:4": ["allocation.method=nm"],
    "wanda": ["reconstruction.method=obs"],
    "besa": FEW,
    "besa-int4": FEW,
    "fast": [],
    "best": ["distill.epochs=1", "distill.autocast=false"],
    "best-int4": ["distill.epochs=1", "distill.autocast=false", "quantization.group=null"],
}
QUICK = {"sparsegpt in 2:4", "wanda"}
SMALL = {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture
def kernels_of_gpu(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The operators of besa that ran on the pretend device, as the kernels for GPUs compute them."""
    ran: set[str] = set()

    def compute(func: Any, args: Any, kwargs: Any, ends_here: bool) -> Any:
        if func.namespace != "besa":
            return func(*args, **kwargs)
        ran.add(func.overloadpacket.__name__)
        return func.redispatch(KERNELS, *args, **kwargs)

    monkeypatch.setattr(pretend, "compute", compute)
    return ran


@pytest.fixture(scope="module")
def folders(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A block each of a family that stores its weights as usual, and of one that stores them transposed."""
    configs = {
        "llama": LlamaConfig(
            **SMALL, num_hidden_layers=1, hidden_size=16, intermediate_size=24, num_attention_heads=2, head_dim=8
        ),
        "gpt2": GPT2Config(**SMALL, n_layer=1, n_head=2, n_embd=16, n_positions=32),
    }
    made = {}
    for name, config in configs.items():
        made[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
        AutoTokenizer.from_pretrained(tiny_llama_folder).save_pretrained(made[name])
    return made


@pytest.mark.usefixtures("torchs_own_products")
@pytest.mark.parametrize("model", some_slow(["llama", "gpt2"], {"gpt2"}))
@pytest.mark.parametrize("run", some_slow(RUNS, RUNS.keys() - QUICK))
def test_a_gpu_prunes_as_the_cpu_does(
    kernels_of_gpu: set[str], folders: dict[str, Path], tiny_llama_folder: Path, run: str, model: str
) -> None:
    recipe = Recipe.load(run.partition(" ")[0], None, RUNS[run])
    text = str(tiny_llama_folder / "calibration.txt")
    on_cpu, there = (
        besa.compress(folders[model], recipe, text, samples=4, seqlen=16, batch=2, device=device).record
        for device in ("cpu", "pretend")
    )
    assert kernels_of_gpu
    assert abs(there.zeros - on_cpu.zeros) <= (on_cpu.zeros * 1e-3 if "int4" in run else 0)
    for block, other in zip(on_cpu.blocks, there.blocks, strict=True):
        assert other.reconstruction_error == pytest.approx(block.reconstruction_error, rel=0.01)
