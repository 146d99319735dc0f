"""The kernels for Arm on another processor: cross-compiled, run by qemu, and compared as test_sparse.py compares others.

They need Debian's g++-aarch64-linux-gnu and qemu-user; where these are missing, the tests say so and are skipped.
"""

import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from besa.kernels import build, sparse_native
from besa.storage.formats import bitmask
from tests.sparse_weights import codes_weight, half_pruned, row_of_x
from tests.unit.test_sparse import assert_close

KERNELS = Path(build.__file__).parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ("-O1", *build.FLAGS[1:], "-fopenmp", "-Wall", "-Wextra", "-Werror")
# Processors that have no more than a path needs, so that an instruction of another path would end the process.
PROCESSORS = {"plain": "cortex-a57", "neon": "cortex-a57", "neondot": "neoverse-n1", "neonbf16": "max"}
HAS = {"cortex-a57": "1100", "neoverse-n1": "1110", "max": "1111"}  # plain, neon, neondot, neonbf16

crossing = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"{COMPILER} or {EMULATOR} is missing (Debian: g++-aarch64-linux-gnu, qemu-user)",
)


def compiled(*arguments):
    subprocess.run([COMPILER, *FLAGS, *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The program of calls.cpp with the kernels in it."""
    built = tmp_path_factory.mktemp("arm") / "calls"
    sources = [Path(__file__).parents[1] / "arm" / "calls.cpp", KERNELS / "sparse.cpp", KERNELS / "sparse_neon.cpp"]
    compiled("-static", "-I", KERNELS, *sources, "-o", built)
    return built


def weights():
    """A weight of every kind and way: several tiles long, one chunk not full, rows that keep all and nothing."""
    for dtype in bitmask.FLOATS:
        for rows, columns in ((13, 1100), (5, 70), (1, 1), (9, 4224)):
            yield bitmask.pack(half_pruned(rows, columns).to(dtype))
    for bits, symmetric in ((4, False), (3, True), (8, False), (8, True)):
        for columns, group in ((4224, 4224), (70, 70), (2176, 128), (1088, 64), (1056, 32), (1040, 16), (72, 8), (60, 4)):
            weight = codes_weight(9, columns, columns // group, bits, symmetric)
            for dtype in (torch.float32, torch.bfloat16):
                yield replace(weight, scales_OG=weight.scales_OG.to(dtype))


def bytes_of(tensor):
    return b"" if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()


def call(weight, path, x_NI, bands, threads):
    """A call as calls.cpp reads it."""
    passed = sparse_native.passed(weight)
    tensors = (weight.masks_BCR, weight.values, weight.offsets, weight.scales_OG, weight.zeros_OG)
    blobs = [bytes_of(tensor) for tensor in tensors]
    numbers = (passed.rows, passed.columns, passed.scale_type, passed.groups, passed.zero)
    numbers += (len(x_NI), threads, bands.start, bands.stop, *map(len, blobs))
    return struct.pack("32s14q", f"{weight.kind}_{path}".encode(), *numbers) + b"".join(blobs) + bytes_of(x_NI.float())


@crossing
@pytest.mark.parametrize("path", PROCESSORS)
def test_products_on_arm(program, path):
    cases = []
    for weight in weights():
        batches = (1, 2, 5) if weight.shape[1] < 2000 else (1, 3)
        for batch in batches:
            x_NI = row_of_x(weight, batch, seed=batch)
            bands = slice(min(1, len(weight.masks_BCR) - 1), len(weight.masks_BCR))
            cases.append((weight, x_NI, bands))
    calls = b"".join(call(weight, path, x_NI, bands, 1 + i % 3) for i, (weight, x_NI, bands) in enumerate(cases))
    processor = PROCESSORS[path]
    found = subprocess.run([EMULATOR, "-cpu", processor, program], input=calls, capture_output=True, check=True).stdout
    assert found[:4].decode() == HAS[processor]
    at = 4
    for weight, x_NI, bands in cases:
        y_NO = torch.frombuffer(bytearray(found[at : at + 4 * len(x_NI) * weight.shape[0]]), dtype=torch.float32)
        at += y_NO.nbytes
        assert_close(y_NO.view(len(x_NI), -1), x_NI, weight)
        dense_OI = weight.unpack() if weight.bits is None else weight.unpack_codes().codes_OI
        expected = bytes_of(dense_OI[bitmask.ROWS * bands.start :].to(weight.values.dtype))
        assert found[at : at + len(expected)] == expected
        at += len(expected)
    assert at == len(found)


@crossing
@pytest.mark.parametrize("source", ["masks.cpp", "sparse_avx512.cpp"])
def test_what_else_is_compiled_on_arm(source):
    compiled("-fsyntax-only", KERNELS / source)
