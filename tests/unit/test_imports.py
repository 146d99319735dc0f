"""What an import costs is what it imports: the command line answers at once only if it brings nothing heavy.

And what it asks the system for.
"""

import os
import subprocess
import sys
from pathlib import Path

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


ASKED = "THP_MEM_ALLOC_ENABLE"
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE = """
import besa, torch
from pathlib import Path
tensor = torch.zeros(64 << 20, dtype=torch.uint8)
regions = Path("/proc/self/smaps").read_text().split("VmFlags")
sizes = [int(line.split()[1]) for text in regions for line in text.splitlines() if line.startswith("AnonHugePages")]
print(sum(sizes))
"""


@pytest.mark.slow
@pytest.mark.skipif(not PAGES.exists() or "[madvise]" not in PAGES.read_text(), reason="programs need not ask here")
def test_large_tensors_are_in_huge_pages():
    """If the system has any in one piece; a user who switched them off keeps that."""
    environment = {name: value for name, value in os.environ.items() if name != ASKED}

    def kilobytes(given):
        return int(subprocess.run([sys.executable, "-c", HUGE], capture_output=True, check=True, env=given).stdout)

    assert kilobytes(environment) > 0
    assert kilobytes(environment | {ASKED: "0"}) == 0
