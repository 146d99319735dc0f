"""What this machine has for besa, and what it lacks: one finding for each part, with what mends it.

A part that is missing may be what others are imported with. So everything but Python's own library is imported where it
is looked at.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import BaseModel

from besa.errors import Notice
from besa.version import __version__

if TYPE_CHECKING:
    import torch
    from packaging.requirements import Requirement

DISTRIBUTION = "besa-llm"
IN_BRIEF = ("torch", "transformers", "huggingface-hub", "safetensors", "numpy")  # whose versions are told
DEVELOPERS = "dev"  # the extra that no user needs
TIMEOUT = 3.0  # seconds to wait for the Hub
LEAST = 1e9  # bytes of memory and disk below which hardly any model can be pruned
COMPILER = {"linux": "apt-get install g++ (or dnf install gcc-c++)", "darwin": "xcode-select --install"}
T = TypeVar("T")


class Finding(BaseModel):
    """What was found of one part.

    Attributes:
        part: what was looked at.
        state: whether it is as besa wants it.
        found: what it is, or what is wrong.
        mend: the command that mends it, or what to do; empty if nothing is missing.
        needed: whether besa cannot work without it. Without the others it lacks something, or is slower.
    """

    part: str
    state: Literal["ok", "missing"]
    found: str
    mend: str = ""
    needed: bool = False


class Diagnosis(BaseModel):
    """All findings, and whether besa can work."""

    works: bool
    findings: list[Finding]

    @property
    def hindering(self) -> list[str]:
        """The parts that are missing and needed."""
        return [finding.part for finding in self.findings if finding.state == "missing" and finding.needed]


def examine() -> Diagnosis:
    """Look at everything; kernels that were never compiled here are compiled now."""
    torch = _torch()
    findings = [*_software(), torch]
    if torch.state == "ok":
        kernels = _seen("CPU kernels", _kernels)
        compiler = _seen("compiler", lambda: _compiler(kernels))
        findings += [_seen("processor", _processor), compiler, kernels, _seen("GPU", _gpu), _seen("Triton", _triton)]
        findings.append(_seen("memory", _memory))
    findings += [_disk(), _seen("cache", _cache), _seen("Hub", _hub), *_extras()]
    works = not any(finding.state == "missing" and finding.needed for finding in findings)
    return Diagnosis(works=works, findings=findings)


def _ok(part: str, found: str) -> Finding:
    return Finding(part=part, state="ok", found=found)


def _missing(part: str, found: str, mend: str, *, needed: bool = False) -> Finding:
    return Finding(part=part, state="missing", found=found, mend=mend, needed=needed)


def _seen(part: str, look: Callable[[], Finding]) -> Finding:
    """What is found of a part; if what besa imports for it cannot be imported, besa cannot work."""
    try:
        return look()
    except ImportError as error:
        return _missing(part, f"cannot be looked at ({error})", _install(DISTRIBUTION), needed=True)


def _software() -> Iterator[Finding]:
    """besa, Python, and the packages that besa always needs."""
    yield _ok("besa", __version__)
    yield _ok("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    required = _required()
    if required is None:
        yield _missing("packages", "besa is not installed, so it says nothing of what it needs", _install(DISTRIBUTION))
        return
    lacking = [found for requirement in required if (found := _lacking(requirement, needed=True)) is not None]
    yield from lacking
    if not lacking:
        told = ", ".join(f"{requirement.name} {version(requirement.name)}" for requirement in _brief(required))
        yield _ok("packages", f"all {len(required)}, of them {told}")


def _brief(required: list[Requirement]) -> list[Requirement]:
    return [requirement for name in IN_BRIEF for requirement in required if requirement.name == name]


def _required(distribution: str = DISTRIBUTION, extra: str = "") -> list[Requirement] | None:
    """What a package requires here, always or for one of its extras; None if it is not installed as a package."""
    from packaging.requirements import Requirement

    try:
        every = [Requirement(text) for text in requires(distribution) or ()]
    except PackageNotFoundError:
        return None
    always = [one for one in every if one.marker is None or one.marker.evaluate({"extra": ""})]
    if not extra:
        return always
    own = [
        one for one in every if one not in always and one.marker is not None and one.marker.evaluate({"extra": extra})
    ]
    inner = [each for one in own for name in one.extras for each in _required(one.name, name) or ()]
    return [*own, *inner]


def _lacking(requirement: Requirement, *, needed: bool = False) -> Finding | None:
    """What is wrong with a package; None if it is as required."""
    wanted = f"{requirement.name}{requirement.specifier}"
    try:
        there = version(requirement.name)
    except PackageNotFoundError:
        return _missing(requirement.name, "not installed", _install(wanted), needed=needed)
    if requirement.specifier.contains(there, prereleases=True):
        return None
    return _missing(
        requirement.name, f"{there}, but besa needs {requirement.specifier}", _install(wanted), needed=needed
    )


def _install(what: str) -> str:
    return f"{Path(sys.executable).name} -m pip install '{what}'"


def _torch() -> Finding:
    """A package that is there may still not load: its libraries are of another system, or damaged."""
    try:
        import torch
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        return _missing("torch", f"cannot be imported ({reason})", _install("torch"), needed=True)
    return _ok("torch", f"{torch.__version__}, {_cuda_of(torch.version.cuda)}")


def _cuda_of(cuda: str | None) -> str:
    return f"built for CUDA {cuda}" if cuda else "built without CUDA"


def _processor() -> Finding:
    import torch

    from besa.kernels.processor import processor
    from besa.system.machine import multiplies_bfloat16

    halves = "multiplies bfloat16" if multiplies_bfloat16(torch.device("cpu")) else "no units for bfloat16"
    features = torch.backends.cpu.get_cpu_capability()
    return _ok("processor", f"{processor()}, {torch.get_num_threads()} threads, {features}, {halves}")


def _compiler(kernels: Finding) -> Finding:
    """The C++ compiler; besa needs none where its kernels came compiled, as in a wheel for this system."""
    from besa.kernels.build import compiler

    path = compiler()
    mend = COMPILER.get(sys.platform, "install a C++ compiler and put it on PATH, or name it in CXX")
    if path is None and kernels.state == "ok":
        return _ok("compiler", "none, and none is needed: besa's kernels came compiled")
    if path is None:
        return _missing("compiler", "no C++ compiler, which besa's kernels for the CPU need", mend)
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace", check=False).stdout
    except OSError as error:
        return _missing("compiler", f"{_short(path)} cannot be started ({error.strerror})", mend)
    return _ok("compiler", f"{_short(path)}, {said.partition(chr(10))[0]}")


def _kernels() -> Finding:
    """What besa's own kernels run as on the CPU."""
    from besa.kernels import attention, dense, native, norm, row_codes, sparse_native, tiles_native

    paths, reason = _with_notices(
        lambda: {
            "masks": native.paths(),
            "sparse": sparse_native.paths(),
            "codes": row_codes.paths(),
            "dense": dense.paths(),
            "tiles": tiles_native.paths(),
            "attention": attention.paths(),
            "norms": norm.paths(),
        }
    )
    shown = ", ".join(f"{name} {best[0] if best else 'torch'}" for name, best in paths.items())
    if paths["masks"] and paths["sparse"]:
        return _ok("CPU kernels", f"{shown}{f' ({reason})' if reason else ''}")
    return _missing("CPU kernels", f"{shown}: slower ({reason})", "mend the compiler, or name another in CXX")


def _gpu() -> Finding:
    import torch

    from besa.system import devices

    found = []
    for kind in devices.TYPES[1:]:
        if devices.is_available(kind):
            count = torch.get_device_module(kind).device_count()
            found += [_device(torch.device(kind, index)) for index in range(count)]
    if found:
        return _ok("GPU", "; ".join(found))
    if shutil.which("nvidia-smi") is None:
        return _ok("GPU", "none: besa computes on the CPU")
    mend = "update the NVIDIA driver" if torch.version.cuda else "reinstall torch in its build for CUDA"
    return _missing("GPU", f"there is an NVIDIA driver, but torch cannot use it ({_cuda_of(torch.version.cuda)})", mend)


def _device(device: torch.device) -> str:
    from besa.system.devices import available_bytes, device_name, shares_memory

    name = f"{device}: {device_name(device)}"
    return name if shares_memory(device) else f"{name}, {available_bytes(device) / 1e9:.1f} GB free"


def _triton() -> Finding:
    import torch

    from besa.kernels.operators import triton_works

    try:
        there = version("triton")
    except PackageNotFoundError:
        there = ""
    if not torch.cuda.is_available():
        return _ok("Triton", f"{there or 'not installed'}; it is for CUDA devices only")
    works, reason = _with_notices(lambda: triton_works(torch.device("cuda", 0)))
    if works:
        return _ok("Triton", f"{there}, its kernels run")
    return _missing("Triton", f"{there or 'not installed'}: slower ({reason})", _install("triton"))


def _memory() -> Finding:
    from besa.system import memory

    free = memory.available_bytes()
    shown = f"{free / 1e9:.1f} GB free of {memory.total_bytes() / 1e9:.1f} GB"
    return _ok("memory", shown) if free >= LEAST else _missing("memory", shown, "end other programs")


def _disk() -> Finding:
    free = shutil.disk_usage(Path()).free
    shown = f"{free / 1e9:.1f} GB free in this folder"
    return _ok("disk", shown) if free >= LEAST else _missing("disk", shown, "make room, or work in another folder")


def _cache() -> Finding:
    """The folder of the embedded model and texts, and of compiled kernels."""
    from besa.data.assets import ASSETS, cache_dir
    from besa.storage.names import nearest

    folder = cache_dir()
    existing = nearest(folder)
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        mend = "export BESA_CACHE=FOLDER, with a folder that you can write to"
        return _missing("cache", f"{_short(folder)} cannot be written", mend)
    there = sum(asset.path.is_file() for asset in ASSETS.values())
    return _ok("cache", f"{_short(folder)}, {there} of {len(ASSETS)} embedded files are there")


def _hub() -> Finding:
    from huggingface_hub import constants

    from besa.models.hub import unreachable

    models = f"models in {_short(constants.HF_HUB_CACHE)}"
    if constants.is_offline_mode():
        return _ok("Hub", f"not asked, as HF_HUB_OFFLINE says; {models}")
    reason = unreachable(TIMEOUT)
    if reason is None:
        return _ok("Hub", f"{constants.ENDPOINT} answers; {models}")
    mend = "check network and proxy; export HF_HUB_OFFLINE=1 works with the models that are there"
    return _missing("Hub", f"{constants.ENDPOINT} does not answer ({reason}); {models}", mend)


def _extras() -> Iterator[Finding]:
    """Packages that only some commands need."""
    if _required() is None:
        return
    for extra in metadata(DISTRIBUTION).get_all("Provides-Extra") or ():
        if extra == DEVELOPERS:
            continue
        required = _required(extra=extra) or []
        lacking = [found for requirement in required if (found := _lacking(requirement)) is not None]
        if lacking:
            shown = "; ".join(f"{found.part} {found.found}" for found in lacking)
            yield _missing(f"extra {extra}", shown, _install(f"{DISTRIBUTION}[{extra}]"))
        else:
            yield _ok(f"extra {extra}", ", ".join(f"{one.name} {version(one.name)}" for one in required))


def _with_notices(look: Callable[[], T]) -> tuple[T, str]:
    """What is found, and the notices that came with it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Notice)
        found = look()
    notices = dict.fromkeys(str(one.message).rstrip(".") for one in caught if issubclass(one.category, Notice))
    return found, "; ".join(notices)


def _short(path: str | Path) -> str:
    """A path without the name of the user, for pages that all can read."""
    home = Path.home()
    return str(Path("~") / Path(path).relative_to(home)) if Path(path).is_relative_to(home) else str(path)
