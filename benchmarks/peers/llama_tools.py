"""The programs of llama.cpp, built from the source package of llama-cpp-python on the package index.

They are built once, for this processor, in a folder of the user's cache.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from besa.data.assets import cache_dir
from besa.errors import BesaError

VERSION = "0.3.36"  # of llama-cpp-python, whose source package holds llama.cpp
PROGRAMS = ("llama-bench", "llama-quantize", "llama-perplexity", "llama-tokenize")
SETTINGS = ("CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "BUILD_SHARED_LIBS=OFF", "LLAMA_BUILD_TOOLS=ON")
NOT_BUILT = ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER")


class CrashError(BesaError):
    """A signal ended a program."""


@dataclass(frozen=True)
class Tools:
    """Programs of llama.cpp in a folder; `threads` of the processor are theirs."""

    folder: Path
    threads: int

    def quantize(self, file: Path, out: Path, kind: str) -> None:
        """Write another kind of a .gguf file, such as Q4_0, with the program's own choices."""
        self._run("llama-quantize", file, out, kind, self.threads)

    def pace(self, file: Path, prompt: int, steps: int) -> float:
        """Tokens a second of a prompt of so many tokens, or of decoding so many, once, after a warm-up."""
        options = ("-m", file, "-t", self.threads, "-p", prompt, "-n", steps, "-r", 1, "-o", "json")
        (measured,) = json.loads(self._run_either(("--repack", 0), "llama-bench", *options))
        return float(measured["avg_ts"])

    def tokens(self, file: Path, text: Path) -> list[int]:
        """The tokens of a text, which are not always those of transformers."""
        said = self._run("llama-tokenize", "-m", file, "-f", text, "--ids", "--no-bos", "--no-escape", "--log-disable")
        found: list[int] = json.loads(said)
        return found

    def perplexity(self, file: Path, text: Path, window: int, windows: int) -> float:
        """Of the second half of each window of a text: exp of the mean loss of its tokens."""
        options = ("-m", file, "-f", text, "-c", window, "-b", window, "--chunks", windows, "-t", self.threads)
        said = self._run_either(("--no-repack",), "llama-perplexity", *options, "--no-escape")
        found = re.search(r"Final estimate: PPL = ([0-9.]+)", said)
        if found is None:
            raise BesaError(f"llama-perplexity says no perplexity of {file}.")
        return float(found[1])

    def _run_either(self, usual: tuple[object, ...], program: str, *arguments: object) -> str:
        """What a program prints with weights in another layout for the processor, which is its default.

        Where that crashes, as products of codes with many rows do on Intel's matrix unit in this version, without.

        Args:
            usual: option of the program for the usual layout.
            program: to run.
            arguments: of the program.
        """
        try:
            return self._run(program, *arguments)
        except CrashError as crash:
            print(f"Measured with {usual[0]}, as without it {crash}", flush=True)
            return self._run(program, *arguments, *usual)

    def _run(self, program: str, *arguments: object) -> str:
        """What a program prints.

        Raises:
            CrashError: a signal ended it.
            BesaError: it fails.
        """
        command = [str(self.folder / program), *map(str, arguments)]
        ran = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if ran.returncode:
            kind = CrashError if ran.returncode < 0 else BesaError
            raise kind(f"{' '.join(command)} failed ({ran.returncode}): {(ran.stderr or ran.stdout).strip()[-400:]}")
        return ran.stdout + ran.stderr if program == "llama-perplexity" else ran.stdout


def built(jobs: int) -> Path:
    """The folder of the programs; they are downloaded and compiled if they are not there.

    Args:
        jobs: compilers at a time.

    Raises:
        BesaError: they cannot be downloaded or compiled.
    """
    home = cache_dir() / "peers" / f"llama-cpp-python-{VERSION}"
    programs = home / "build" / "bin"
    if all((programs / name).is_file() for name in PROGRAMS):
        return programs
    home.mkdir(parents=True, exist_ok=True)
    name = f"llama_cpp_python-{VERSION}"
    source = home / name / "vendor" / "llama.cpp"
    if not (source / "tools" / "llama-bench").is_dir():
        package = "llama-cpp-python"
        options = ("--no-deps", f"--no-binary={package}", f"--dest={home}", f"{package}=={VERSION}")
        _call(sys.executable, "-P", "-m", "pip", "download", *options)
        with tarfile.open(home / f"{name}.tar.gz") as archive:
            archive.extractall(home, filter="data")
    settings = [*SETTINGS, *(f"{part}=OFF" for part in NOT_BUILT)]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    _call("cmake", "-S", source, "-B", home / "build", *generator, *(f"-D{setting}" for setting in settings))
    _call("cmake", "--build", home / "build", "-j", jobs, "--target", *PROGRAMS)
    return programs


def _call(*command: object) -> None:
    """Run a step of the build, with its output shown.

    Raises:
        BesaError: it fails.
    """
    try:
        subprocess.run([str(part) for part in command], check=True, env=os.environ | {"PYTHONSAFEPATH": "1"})
    except (OSError, subprocess.CalledProcessError) as error:
        raise BesaError(f"llama.cpp cannot be built: {error}.") from None
