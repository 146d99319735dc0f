"""The page that shows how to add an importance, followed step by step."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from besa.data.calibration import sample
from besa.record import RunRecord

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# Number and path of each step, and its block of code.
STEPS = re.findall(r"^### \d\. [^\n]*?`([^`\n]+)`\n+```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
(COMMANDS,) = re.findall(r"^### 5\. .*?```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def before_and_after(diff: str) -> tuple[str, str]:
    """The lines of a file that a diff of one hunk replaces, and what it puts there."""
    lines = diff.splitlines()
    return tuple("\n".join(line[1:] for line in lines if not line.startswith(skip)) for skip in "+-")


def renamed(text: str) -> str:
    """The method by a name that besa does not ship."""
    for name, other in (("ria", "kin"), ("RIA", "Kin")):
        text = re.sub(rf"(?<![A-Za-z]){name}(?![A-Za-z])", other, text)
    return text


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package from which RIA is taken out as the page says that it is put in."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "tests/unit").mkdir(parents=True)
    for path, language, body in STEPS:
        shipped = (ROOT / path).read_text(encoding="utf-8")
        if language == "diff":
            without, with_it = before_and_after(body)
            assert shipped.count(with_it) == 1
            (copy / path).write_text(shipped.replace(with_it, without), encoding="utf-8")
        else:
            assert body == shipped
            (copy / path).unlink(missing_ok=True)
    left = [path for path in copy.rglob("*.*") if re.search(r"\bria\b", path.read_text(encoding="utf-8"), re.I)]
    assert left == []  # nothing else knows it
    return copy


def seen(linear: nn.Linear, model: nn.Module, tokens_NT: Tensor) -> Tensor:
    """The inputs (T, I) of a linear while the model runs."""
    inputs: list[Tensor] = []
    linear.register_forward_hook(lambda _, given, __: inputs.append(given[0].flatten(0, 1)))
    model(tokens_NT)
    return torch.cat(inputs)


@pytest.mark.slow
def test_an_importance_is_added_as_the_page_says(
    package, tmp_path, tiny_llama, tiny_llama_folder, tiny_tokenizer, record_property
):
    assert len(STEPS) == 4
    began = time.perf_counter()
    for path, language, body in STEPS:
        file = package / renamed(path)
        if language == "diff":
            without, with_it = before_and_after(body)
            file.write_text(file.read_text(encoding="utf-8").replace(without, renamed(with_it)), encoding="utf-8")
        else:
            file.write_text(renamed(body), encoding="utf-8")
    test, prune = (shlex.split(renamed(line)) for line in COMMANDS.splitlines())
    out = tmp_path / prune[3]
    prune[2:4] = [str(tiny_llama_folder), str(out)]  # in place of smollm2
    sizes = ["--calibration", str(tiny_llama_folder / "calibration.txt"), "--samples", "2", "--seqlen", "32"]
    environment = os.environ | {"PYTHONPATH": str(package / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    for words in (["pytest", *test[1:], "-p", "no:cacheprovider"], ["besa", *prune[1:], *sizes]):
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=package, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    seconds = time.perf_counter() - began
    record_property("seconds_of_the_walk", seconds)
    print(f"The walk through CONTRIBUTING.md took {seconds:.1f} s.")

    record = RunRecord.model_validate_json((out / "besa_run.json").read_text(encoding="utf-8"))
    assert record.recipe["name"] == "kin"
    assert record.recipe["importance"] == {"method": "kin", "exponent": 0.5}
    assert record.zeros == round(0.5 * record.weights)

    query = tiny_llama.model.layers[0].self_attn.q_proj
    pruned_OI = load_file(out / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    with torch.no_grad():
        x_TI = seen(query, tiny_llama, sample(sizes[1], tiny_tokenizer, 2, 32, 0).tokens_NT)
        size_OI = query.weight.abs()
        score_OI = (size_OI / size_OI.sum(1, keepdim=True) + size_OI / size_OI.sum(0)) * x_TI.norm(dim=0).sqrt()
    lowest = score_OI.flatten().argsort()[: score_OI.numel() // 2]
    assert set(lowest.tolist()) == set((pruned_OI == 0).flatten().nonzero()[:, 0].tolist())
