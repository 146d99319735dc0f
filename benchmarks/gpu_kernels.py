"""What the Triton kernels take of a GPU, known without one: registers, shared memory, and the occupancy these allow.

python -m benchmarks.gpu_kernels    # writes results/gpu-kernels.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer

RESULTS = Path(__file__).parent / "results" / "gpu-kernels.json"


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").

    Attributes:
        warps: of 32 threads, resident at a time.
        programs: resident at a time.
        shared: bytes of shared memory.
    """

    warps: int
    programs: int
    shared: int

    def occupancy(self, registers: int, shared: int, warps: int) -> float:
        """The share of the warps that can be resident, if all run one kernel.

        A warp gets registers in units of 256, a program shared memory in units of 128 bytes and 1 KiB for the system.

        Args:
            registers: of a thread.
            shared: bytes of shared memory of a program.
            warps: of a program.
        """
        of_warp = -(-32 * max(registers, 1) // 256) * 256
        of_program = -(-shared // 128) * 128 + 1024
        resident = min(self.programs, self.warps // warps, REGISTERS // of_warp // warps, self.shared // of_program)
        return resident * warps / self.warps


REGISTERS = 65536  # of a multiprocessor, on all of these
MULTIPROCESSORS = {  # A100, H100, B200, consumer Blackwell
    80: Multiprocessor(warps=64, programs=32, shared=164 << 10),
    90: Multiprocessor(warps=64, programs=32, shared=228 << 10),
    100: Multiprocessor(warps=64, programs=32, shared=228 << 10),
    120: Multiprocessor(warps=48, programs=24, shared=100 << 10),
}


def results(architectures: Iterable[int] = MULTIPROCESSORS, cache: Path | None = None) -> dict[str, Any]:
    """What is written: the version of Triton, and every kernel on every architecture.

    Args:
        architectures: those of `MULTIPROCESSORS` to compile for.
        cache: folder in which Triton keeps what it compiled; by default Triton's own.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-m", "tests.compiled", *map(str, architectures)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"A kernel does not compile:\n{done.stderr[-4000:]}")
    kernels = json.loads(done.stdout)
    for one in kernels:
        limits = MULTIPROCESSORS[one["architecture"]]
        one["occupancy"] = round(limits.occupancy(one["registers"], one["shared"], one["warps"]), 3)
    return {"triton": version("triton"), "kernels": kernels}


def main() -> None:
    """Write the results, one kernel a line."""
    found = results()
    lines = ",\n".join(json.dumps(one) for one in found["kernels"])
    RESULTS.write_text(f'{{"triton": "{found["triton"]}", "kernels": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    typer.run(main)
