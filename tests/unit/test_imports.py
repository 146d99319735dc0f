"""What an import costs is what it imports: the command line answers at once only if it brings nothing heavy."""

import subprocess
import sys

import pytest

HEAVY = {
    "torch", "transformers", "safetensors", "gguf", "accelerate", "huggingface_hub", "tokenizers", "matplotlib",
    "numpy", "scipy", "jinja2",
    "pydantic", "pandas", "datasets", "pyarrow", "lm_eval", "triton", "compressed_tensors", "vllm",
}  # fmt: skip
OF_THE_TERMINAL = {"typer", "rich", "click", "yaml", "platformdirs"}
HELP = """
import contextlib, io
from besa.cli import app
with contextlib.redirect_stdout(io.StringIO()) as said:
    app(["--help"], prog_name="besa", standalone_mode=False)
assert "prune" in said.getvalue()
"""


@pytest.mark.parametrize(("code", "unwanted"), [("import besa", HEAVY | OF_THE_TERMINAL), (HELP, HEAVY)])
def test_nothing_heavy_is_imported(code, unwanted):
    told = "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    found = subprocess.run([sys.executable, "-c", code + told], capture_output=True, text=True, check=True)
    assert not unwanted & {*found.stdout.split()}
