"""The reference against loops in Python, C++ against the reference to the bit, Triton through its interpreter."""

import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from besa import kernels
from besa.errors import Notice
from besa.kernels import build, native, reference
from besa.storage import locking
from tests.slowly import some_slow

compiled = pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="there is no C++ compiler here")
WHERE = [(path, dtype) for path in native.paths() for dtype in native.NUMBERS]


@pytest.fixture(scope="module")
def gpu():
    """The Triton kernels on CPU tensors (conftest.py says so to triton)."""
    pytest.importorskip("triton")
    from besa.kernels.gpu import masks as gpu

    return gpu


@st.composite
def passes(draw, whole=False, most=(9, 150)):
    """Arguments of both kernels for a random weight: (gradient, w, ranks, counts, bins, number of bins)."""
    rows, columns = draw(st.integers(1, most[0])), draw(st.integers(1, most[1]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    w_OI, gradient_OI = torch.randn(2, rows, columns, generator=generator)
    if whole:  # sums of small whole numbers are exact in any order
        w_OI, gradient_OI = (3 * w_OI).round(), (3 * gradient_OI).round()
    ranks_OI = torch.rand(rows, columns, generator=generator).argsort(dim=1)
    ranks_OI = ranks_OI.to(draw(st.sampled_from([torch.int16, torch.int32])))
    counts_O = torch.randint(columns + 1, (rows,), generator=generator)
    counts_O[0] = draw(st.sampled_from([0, columns, columns // 2]))
    n_bins = draw(st.sampled_from([2, 11, 101]))
    bins_I = torch.randint(n_bins, (columns,), generator=generator).sort().values.to(torch.int16)
    return gradient_OI, w_OI, ranks_OI, counts_O, bins_I, n_bins


def masked(module, w_OI, ranks_OI, counts_O, **where):
    out_OI = torch.full_like(w_OI, torch.nan)
    module.masked(w_OI, ranks_OI, counts_O, out_OI, **where)
    return out_OI


def binned(module, gradient_OI, w_OI, ranks_OI, bins_I, n_bins, **where):
    out_OB = torch.full((len(w_OI), n_bins), torch.nan)
    module.binned(gradient_OI, w_OI, ranks_OI, bins_I, out_OB, **where)
    return out_OB


@given(passes(whole=True, most=(4, 12)))
@settings(deadline=None)
def test_the_reference_against_loops(case):
    gradient_OI, w_OI, ranks_OI, counts_O, bins_I, n_bins = case
    expected_OI, expected_OB = torch.zeros_like(w_OI), torch.zeros(len(w_OI), n_bins)
    for o, row in enumerate(ranks_OI.tolist()):
        for i, place in enumerate(row):
            if place >= counts_O[o]:
                expected_OI[o, i] = w_OI[o, i]
            expected_OB[o, bins_I[place]] += gradient_OI[o, i] * w_OI[o, i]
    assert torch.equal(masked(reference, w_OI, ranks_OI, counts_O), expected_OI)
    assert torch.equal(binned(reference, gradient_OI, w_OI, ranks_OI, bins_I, n_bins), expected_OB)


@given(passes(), st.integers(1, 20))
@settings(deadline=None)
def test_the_reference_does_not_depend_on_the_chunk(case, chunk):
    gradient_OI, w_OI, ranks_OI, _, bins_I, n_bins = case
    whole_OB = binned(reference, gradient_OI, w_OI, ranks_OI, bins_I, n_bins)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK", chunk)
        assert torch.equal(binned(reference, gradient_OI, w_OI, ranks_OI, bins_I, n_bins), whole_OB)


@compiled
def test_this_machine_has_kernels():
    assert native.paths(), "without kernels, the tests below test nothing"
    assert native.paths()[-1] == "plain"


@pytest.mark.parametrize(("path", "dtype"), WHERE)
@given(case=passes(), threads=st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_cpp_gives_the_bits_of_the_reference(path, dtype, case, threads):
    gradient_OI, w_OI, ranks_OI, counts_O, bins_I, n_bins = case
    gradient_OI, w_OI = gradient_OI.to(dtype), w_OI.to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found_OI = masked(native, w_OI, ranks_OI, counts_O, path=path)
        found_OB = binned(native, gradient_OI, w_OI, ranks_OI, bins_I, n_bins, path=path)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found_OI, masked(reference, w_OI, ranks_OI, counts_O))
    assert torch.equal(found_OB, binned(reference, gradient_OI, w_OI, ranks_OI, bins_I, n_bins))


@compiled
@pytest.mark.parametrize("columns", [32_767, 40_000])
def test_the_widest_rows(columns):
    """Where int16 ranks end and int32 ranks begin."""
    dtype = torch.int16 if columns == 32_767 else torch.int32
    ranks_OI = torch.rand(2, columns).argsort(dim=1).to(dtype)
    gradient_OI, w_OI = torch.randn(2, 2, columns)
    bins_I = (torch.arange(columns) * 100 // columns).to(torch.int16)
    for counts_O in (torch.tensor([0, columns]), torch.tensor([columns - 1, 1])):
        expected_OI = masked(reference, w_OI, ranks_OI, counts_O)
        assert (expected_OI == 0).sum(dim=1).tolist() == counts_O.tolist()
        assert torch.equal(masked(native, w_OI, ranks_OI, counts_O), expected_OI)
    expected_OB = binned(reference, gradient_OI, w_OI, ranks_OI, bins_I, 100)
    assert torch.equal(binned(native, gradient_OI, w_OI, ranks_OI, bins_I, 100), expected_OB)


@pytest.mark.parametrize("dtype", some_slow([torch.float32, torch.bfloat16, torch.float16], {torch.float16}))
@given(case=passes(most=(3, 150)))
@settings(deadline=None, max_examples=15)
def test_triton_agrees_with_the_reference(gpu, dtype, case):
    gradient_OI, w_OI, ranks_OI, counts_O, bins_I, n_bins = case
    gradient_OI, w_OI = gradient_OI.to(dtype), w_OI.to(dtype)
    assert torch.equal(masked(gpu, w_OI, ranks_OI, counts_O), masked(reference, w_OI, ranks_OI, counts_O))
    found_OB = binned(gpu, gradient_OI, w_OI, ranks_OI, bins_I, n_bins)
    torch.testing.assert_close(found_OB, binned(reference, gradient_OI, w_OI, ranks_OI, bins_I, n_bins))


def test_triton_splits_wide_rows(gpu):
    """More columns than a program takes at a time, and more bins than warps are wide."""
    ranks_OI = torch.rand(1, 2500).argsort(dim=1).to(torch.int16)
    gradient_OI, w_OI = torch.randint(-9, 10, (2, 1, 2500)).float()
    bins_I = (torch.arange(2500) * 1001 // 2500).to(torch.int16)
    counts_O = torch.tensor([1300])
    assert torch.equal(masked(gpu, w_OI, ranks_OI, counts_O), masked(reference, w_OI, ranks_OI, counts_O))
    expected_OB = binned(reference, gradient_OI, w_OI, ranks_OI, bins_I, 1001)
    assert torch.equal(binned(gpu, gradient_OI, w_OI, ranks_OI, bins_I, 1001), expected_OB)


def test_what_has_no_kernel_goes_to_the_reference(monkeypatch):
    ranks_OI, counts_O = torch.tensor([[1, 0]], dtype=torch.int16), torch.tensor([1])
    half_OI = torch.tensor([[1.0, 2.0]], dtype=torch.float16)
    assert not native.serves(half_OI)
    assert masked(kernels, half_OI, ranks_OI, counts_O).tolist() == [[1, 0]]
    monkeypatch.setattr(native, "paths", list)
    assert not native.serves(half_OI.float())
    assert masked(kernels, half_OI.float(), ranks_OI, counts_O).tolist() == [[1, 0]]


# Building


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, nothing remembered, and a compiler that does not take long."""
    monkeypatch.setenv("BESA_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))
    build.load.cache_clear()
    yield tmp_path / "kernels"
    build.load.cache_clear()


def load_anew(source="masks.cpp"):
    build.load.cache_clear()
    return build.load(source)


def assert_works():
    w_OI, ranks_OI = torch.ones(5, 3), torch.tensor([[0, 1, 2]] * 5, dtype=torch.int16)
    assert masked(native, w_OI, ranks_OI, torch.tensor([0, 1, 2, 3, 0])).sum(dim=1).tolist() == [3, 2, 1, 0, 3]


@pytest.fixture
def compilations(monkeypatch):
    """The sources that are compiled."""
    found, call = [], build._call

    def noting(*command):
        found.extend(argument for argument in command if argument.endswith(".cpp"))
        return call(*command)

    monkeypatch.setattr(build, "_call", noting)
    return found


@compiled
def test_built_once(fresh, compilations):
    assert load_anew() is not None
    (built,) = fresh.iterdir()  # no scratch left
    assert built.suffix == ".so"
    assert (fresh.stat().st_mode & 0o777, len(compilations)) == (0o700, 1)
    assert load_anew() is not None
    assert len(compilations) == 1


@compiled
@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:-9] + b"x" + b[-8:]])
def test_a_damaged_library_is_built_anew(fresh, compilations, damage):
    load_anew()
    (built,) = fresh.iterdir()
    whole = built.read_bytes()
    built.unlink()  # it is in use
    built.write_bytes(damage(whole))
    assert load_anew() is not None
    assert_works()
    assert len(compilations) == 2
    assert built.read_bytes() == whole


@compiled
@pytest.mark.parametrize("whose", ["anybody's", "another's", "a link's"])
def test_nothing_is_loaded_from_a_folder_of_others(fresh, tmp_path, monkeypatch, compilations, whose):
    load_anew()
    (built,) = fresh.iterdir()
    ran, code = tmp_path / "ran", tmp_path / "planted.cpp"
    code.write_text(f"""#include <cstdio>
        __attribute__((constructor)) static void run() {{ fclose(fopen("{ran}", "w")); }}""")
    subprocess.run([shutil.which("c++"), "-shared", "-fPIC", code, "-o", tmp_path / "planted.so"], check=True)
    built.unlink()
    planted = (tmp_path / "planted.so").rename(
        fresh / build._name(built.name.partition("-")[0], tmp_path / "planted.so")
    )
    if whose == "anybody's":
        fresh.chmod(0o777)
    elif whose == "another's":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    else:
        fresh.rename(tmp_path / "elsewhere").chmod(0o700)
        fresh.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(Notice, match="not writable by this user alone: remove it, or point BESA_CACHE to"):
        assert load_anew() is not None
    assert_works()
    assert not ran.exists()
    assert list(fresh.iterdir()) == [fresh / planted.name]
    assert len(compilations) == 2


@compiled
def test_a_library_belongs_to_source_compiler_and_flags(fresh, tmp_path, monkeypatch):
    compiler, version = tmp_path / "compiler", tmp_path / "version"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec cat {version}\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    for number in (1, 2):
        version.write_text(f"compiler {number}")
        load_anew()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    load_anew()
    load_anew("sparse.cpp")
    assert len({path.name.partition("-")[0] for path in fresh.iterdir()}) == len(list(fresh.iterdir())) == 4


def test_what_is_included_belongs_to_the_source():
    source, shared = build.assembled("sparse.cpp"), build.assembled("sparse.hpp")
    assert shared in source
    assert b'#include "' not in source


@pytest.mark.slow
@compiled
def test_two_processes_may_fill_the_cache_at_once(fresh, tmp_path):
    compiler, here = tmp_path / "compiler", tmp_path / "here"
    # Each compiles only when the other is about to: none finds the library of the other.
    waits = f'echo >> {here}; while [ "$(wc -l < {here})" -lt 2 ]; do sleep 0.01; done'
    compiler.write_text(f'#!/bin/sh\n[ "$1" = -O0 ] && {{ {waits}; }}\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "BESA_CACHE": str(tmp_path)}
    code = f"from besa.kernels import build; build.FLAGS = {build.FLAGS!r}; assert build.load('masks.cpp') is not None"
    both = [subprocess.Popen([sys.executable, "-W", "error", "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(timeout=900) for process in both] == [0, 0]
    assert len(here.read_text().splitlines()) == 2
    (built,) = fresh.iterdir()
    assert built.name == build._name(built.name.partition("-")[0], built)


@compiled
def test_a_cache_that_cannot_be_is_done_without(fresh):
    fresh.write_text("in the way")
    with pytest.warns(Notice, match="for this run only because .* cannot be made"):
        assert load_anew() is not None
    assert_works()


@pytest.mark.parametrize("broken", ["false", "no compiler"])
def test_without_a_compiler_there_is_a_notice(fresh, monkeypatch, broken):
    monkeypatch.setattr(build, "COMPILERS", ())
    monkeypatch.setenv("CXX", broken)
    with pytest.warns(Notice, match="more slowly") as said:
        assert build.load("masks.cpp") is None
    assert build.load("masks.cpp") is None
    assert len(said) == 1


@pytest.mark.slow
@compiled
def test_threads_are_those_of_torch(fresh):
    """No second OpenMP library comes in with the kernels: its threads would fight with torch's."""
    code = "import torch; from besa.kernels.build import load; assert load('masks.cpp'); "
    code += "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'iomp' in line}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert found.stdout.strip() == "1"


@pytest.fixture
def wheel(fresh, tmp_path, monkeypatch):
    """The folder in which a wheel of this platform has its libraries, with that of masks.cpp."""
    folder = tmp_path / "wheel"
    folder.mkdir()
    monkeypatch.setattr(build, "PREBUILT", str(folder))
    build._prebuilt(build.compiler(), build.assembled("masks.cpp"), folder)
    return folder


@compiled
def test_what_the_wheel_brings_needs_no_compiler(wheel, fresh, compilations, monkeypatch):
    monkeypatch.setattr(build, "COMPILERS", ())
    monkeypatch.delenv("CXX", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_anew() is not None
    assert_works()
    assert not compilations and not fresh.exists()


@compiled
def test_the_same_kernels_are_compiled_to_the_same_bytes(wheel):
    before = {path: path.read_bytes() for path in wheel.iterdir()}
    again = build._prebuilt(build.compiler(), build.assembled("masks.cpp"), wheel)
    assert before == {again: again.read_bytes()}


@compiled
@pytest.mark.parametrize("change", ["damaged", "flags", "not for this system"])
def test_what_does_not_fit_is_compiled_here(wheel, fresh, compilations, monkeypatch, change):
    (library,) = wheel.iterdir()
    if change == "damaged":
        library.write_bytes(library.read_bytes()[:-9] + b"x" + library.read_bytes()[-8:])
    elif change == "flags":
        monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    else:
        library.write_bytes(b"no library")
        library.rename(wheel / build._name(library.name.partition("-")[0], library))
    assert load_anew() is not None
    assert_works()
    assert len(compilations) == 1 and len([*fresh.iterdir()]) == 1


def test_windows_is_told_that_there_are_no_kernels(fresh, monkeypatch):
    monkeypatch.setattr(locking, "WINDOWS", True)
    with pytest.warns(Notice, match="in plain torch: its kernels are for Linux and macOS"):
        assert build.load("masks.cpp") is None


@compiled
def test_a_compiler_without_openmp_serves_too_and_says_so(fresh, monkeypatch):
    monkeypatch.setattr(build, "OPENMP_FLAGS", (("-no-such-option",), ()))
    with pytest.warns(Notice, match="kernels use one thread, without OpenMP: .*no-such-option"):
        assert build.load("masks.cpp") is not None
    assert_works()
