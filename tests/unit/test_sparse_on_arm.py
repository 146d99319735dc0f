"""The kernels for Arm: cross-compiled, run by qemu, and compared as test_sparse.py compares those for other processors.

They need Debian's g++-aarch64-linux-gnu and qemu-user; where these are missing, the tests say so and are skipped.
"""

import io
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
GROUPS = [(4224, 4224), (70, 70), (8448, 4224), (2304, 192), (1088, 64), (1056, 32), (1040, 16), (72, 8), (60, 4)]
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
        for columns, group in GROUPS:
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


def called(program, path, cases):
    """What a path gives for every weight, x and bands: y, and the bands' bytes when they are dense."""
    calls = b"".join(call(weight, path, x_NI, bands, 1 + i % 3) for i, (weight, x_NI, bands) in enumerate(cases))
    processor = PROCESSORS[path]
    found = subprocess.run([EMULATOR, "-cpu", processor, program], input=calls, capture_output=True, check=True).stdout
    stream = io.BytesIO(found)
    assert stream.read(4).decode() == HAS[processor]
    results = []
    for weight, x_NI, bands in cases:
        rows = min(bitmask.ROWS * bands.stop, weight.shape[0]) - bitmask.ROWS * bands.start
        y = stream.read(4 * len(x_NI) * weight.shape[0])
        dense = stream.read(rows * weight.shape[1] * weight.values.itemsize)
        results.append((torch.frombuffer(bytearray(y), dtype=torch.float32).view(len(x_NI), -1), dense))
    assert not stream.read()
    return results


@crossing
@pytest.mark.parametrize("path", PROCESSORS)
def test_products_on_arm(program, path):
    cases = []
    for weight in weights():
        bands = slice(min(1, len(weight.masks_BCR) - 1), len(weight.masks_BCR))
        batches = (1, 2, 5) if weight.shape[1] < 2000 else (1, 3)
        cases += [(weight, row_of_x(weight, batch, seed=batch), bands) for batch in batches]
    for (weight, x_NI, bands), (y_NO, dense) in zip(cases, called(program, path, cases), strict=True):
        assert_close(y_NO, x_NI, weight)
        expected_OI = weight.unpack() if weight.bits is None else weight.unpack_codes().codes_OI
        assert dense == bytes_of(expected_OI[bitmask.ROWS * bands.start :].to(weight.values.dtype))


@crossing
@pytest.mark.parametrize("path", PROCESSORS)
def test_what_is_no_number_or_nothing_shows_on_arm(program, path):
    weights = [bitmask.pack(half_pruned(5, 70).to(dtype)) for dtype in bitmask.FLOATS]
    weights += [codes_weight(5, 70, 1, bits, False) for bits in (4, 8)]
    x_NI = torch.ones(3, 70)
    x_NI[0, 3], x_NI[1, 69], x_NI[2] = torch.inf, torch.nan, 0
    rows = [x_NI, x_NI[:1], x_NI[1:2], x_NI[2:]]
    cases = [(weight, x_NI, slice(0, 1)) for weight in weights for x_NI in rows]
    for (_, x_NI, _), (y_NO, _) in zip(cases, called(program, path, cases), strict=True):
        for n, sound in enumerate(x_NI.isfinite().all(dim=1).tolist()):
            assert not y_NO[n].any() if sound else not y_NO[n, -1].isfinite()


@crossing
@pytest.mark.parametrize("source", ["masks.cpp", "sparse_avx2.cpp", "sparse_avx512.cpp"])
def test_what_else_is_compiled_on_arm(source):
    compiled("-fsyntax-only", KERNELS / source)
