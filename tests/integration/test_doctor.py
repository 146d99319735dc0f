"""besa doctor: what it finds here, and what it says where something is missing."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

import besa
from besa import doctor
from besa.data.assets import ASSETS
from besa.doctor import Diagnosis, Finding, examine
from besa.kernels import build, native, sparse_native
from tests.calling import called

PARTS = [
    "besa",
    "python",
    "packages",
    "torch",
    "processor",
    "compiler",
    "CPU kernels",
    "GPU",
    "Triton",
    "memory",
    "disk",
]
REQUIRED = ["torch>=2.11,<2.15", "numpy>=2", "none-such>=1; extra == 'data'", "pytest>=8; extra == 'dev'"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions of packages by name, as if these were all."""
    there = {"torch": torch.__version__, "numpy": "2.1"}

    def version(name: str) -> str:
        if name not in there:
            raise PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "requires", lambda name: REQUIRED)
    monkeypatch.setattr(doctor, "metadata", lambda name: Extras())
    return there


class Extras:
    def get_all(self, name: str) -> list[str]:
        assert name == "Provides-Extra"
        return ["data", "dev"]


def test_this_machine_works(offline: None, tmp_path: Path) -> None:
    shown = called("doctor", "--json", tmp_path / "doctor.json")
    assert (shown.returncode, shown.stderr) == (0, "")
    found = Diagnosis.model_validate_json((tmp_path / "doctor.json").read_text())
    assert found.works
    parts = [finding.part for finding in found.findings]
    assert [part for part in parts if part in PARTS] == PARTS
    assert {"cache", "Hub"} <= set(parts)
    by_part = {finding.part: finding for finding in found.findings}
    assert by_part["besa"].found == besa.__version__
    assert torch.__version__ in by_part["torch"].found
    if by_part["compiler"].state == "ok":
        kernels = f"masks {native.paths()[0]}, sparse {sparse_native.paths()[0]}, "
        assert by_part["CPU kernels"].found.startswith(kernels)
    assert f"of {len(ASSETS)} embedded files" in by_part["cache"].found
    for finding in found.findings:
        assert f"{finding.state:8}{finding.part:12} {finding.found}\n" in shown.stdout + "\n"
        assert bool(finding.mend) == (finding.state == "missing")
        assert not finding.mend or f"mend: {finding.mend}\n" in shown.stdout + "\n"
        assert str(Path.home()) not in finding.found


def test_a_package_that_is_missing_or_old_is_named_with_its_command(installed: dict[str, str]) -> None:
    python = Path(sys.executable).name
    assert doctor._software is not None
    _, _, packages = doctor._software()
    assert packages == Finding(
        part="packages", state="ok", found=f"all 2, of them torch {torch.__version__}, numpy 2.1"
    )
    del installed["numpy"]
    installed["torch"] = "2.10.0"
    _, _, *lacking = doctor._software()
    assert lacking == [
        Finding(
            part="torch", state="missing", needed=True, found="2.10.0, but besa needs <2.15,>=2.11",
            mend=f"{python} -m pip install 'torch<2.15,>=2.11'",
        ),
        Finding(
            part="numpy", state="missing", needed=True, found="not installed",
            mend=f"{python} -m pip install 'numpy>=2'",
        ),
    ]  # fmt: skip
    assert list(doctor._extras()) == [
        Finding(
            part="extra data", state="missing", found="none-such not installed",
            mend=f"{python} -m pip install 'besa-llm[data]'",
        )
    ]  # fmt: skip
    installed["none-such"] = "1.5"
    assert list(doctor._extras()) == [Finding(part="extra data", state="ok", found="none-such 1.5")]


def test_what_hinders_besa_ends_with_2_and_is_named(
    installed: dict[str, str], offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    del installed["numpy"]
    monkeypatch.setitem(sys.modules, "torch", None)
    shown = called("doctor", "--json", "-")
    assert shown.returncode == 2
    assert shown.stderr == "besa: besa cannot work here without numpy, torch: do what is said above.\n"
    found = json.loads(shown.stdout)
    assert not found["works"]
    parts = [finding["part"] for finding in found["findings"]]
    assert "CPU kernels" not in parts  # cannot be looked at
    assert examine().hindering == ["numpy", "torch"]


@pytest.mark.parametrize(
    "absent",
    [
        ["torch", "safetensors", "numpy", "transformers"],
        pytest.param(["safetensors", "numpy"], marks=pytest.mark.slow),
    ],
)
def test_what_is_found_is_written_without_the_packages_that_are_missing(tmp_path: Path, absent: list[str]) -> None:
    code = f"import sys; sys.modules |= dict.fromkeys({absent}); from besa.cli import main; main()"
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, "doctor", "--json", tmp_path / "doctor.json"]
    ended = subprocess.run(command, capture_output=True, text=True, env=offline)
    assert ended.returncode == 2
    hindering = Diagnosis.model_validate_json((tmp_path / "doctor.json").read_text()).hindering
    assert ("torch" in hindering) == ("torch" in absent) and hindering
    told = f"besa cannot work here without {', '.join(hindering)}: do what is said above."
    assert told in " ".join(ended.stderr.split())


def test_without_a_compiler_besa_is_slower_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "COMPILERS", ())
    monkeypatch.setattr(sys, "platform", "linux")
    for cached in (build.load, native.paths, sparse_native.paths):
        cached.cache_clear()
    kernels = doctor._kernels()
    for cached in (build.load, native.paths, sparse_native.paths):
        cached.cache_clear()
    assert kernels.state == "missing"
    assert kernels.found.startswith("masks torch, sparse torch, ")
    assert "there is no C++ compiler here" in kernels.found
    found = doctor._compiler(kernels)
    assert (found.state, found.mend) == ("missing", "apt-get install g++ (or dnf install gcc-c++)")


def test_kernels_that_came_compiled_need_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "COMPILERS", ())
    found = doctor._compiler(Finding(part="CPU kernels", state="ok", found="masks avx2, sparse avx2"))
    assert found == Finding(part="compiler", state="ok", found="none, and none is needed: besa's kernels came compiled")


def test_a_driver_without_a_torch_that_uses_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = doctor._gpu()
    assert (found.state, found.mend) == ("missing", "reinstall torch in its build for CUDA")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert doctor._gpu().mend == "update the NVIDIA driver"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor._gpu() == Finding(part="GPU", state="ok", found="none: besa computes on the CPU")


def test_a_cache_that_cannot_be_written_and_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "file" / "cache"))
    assert doctor._cache().state == "missing"
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "new" / "cache"))
    assert doctor._cache().found == f"{tmp_path}/new/cache, 0 of {len(ASSETS)} embedded files are there"
    usage = type("Usage", (), {"free": 5e8})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert (doctor._disk().state, doctor._disk().found) == ("missing", "0.5 GB free in this folder")


@contextmanager
def hub(monkeypatch: pytest.MonkeyPatch, status: int, body: bytes) -> Iterator[list[str]]:
    """A server in place of the Hub, and the paths that it is asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield asked
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body", "state"), [(200, b"[]", "ok"), (503, b"", "missing"), (200, b"<html>log in</html>", "missing")]
)
def test_the_hub_answers_or_not(monkeypatch: pytest.MonkeyPatch, status: int, body: bytes, state: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with hub(monkeypatch, status, body) as asked:
        found = doctor._hub()
        assert asked == ["/api/models?limit=1"]
        assert found.state == state
        assert ("HF_HUB_OFFLINE=1" in found.mend) == (state == "missing")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert doctor._hub().state == "ok"
        assert len(asked) == 1  # not asked again
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert doctor._hub().state == "missing"  # nobody is there any more
