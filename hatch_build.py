"""The build hook that compiles the kernels into a wheel of this platform; see pyproject.toml."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds a compiled library for each C++ file of `besa.kernels`."""

    def dependencies(self) -> list[str]:
        """What `besa.kernels.build` imports."""
        return ["platformdirs>=4"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, unless the package is installed as it lies here."""
        if version == "editable":
            return
        self.folder = Path(tempfile.mkdtemp())
        build = _build(Path(self.root, "src"))
        for library in build.prebuild(self.folder):
            build_data["force_include"][str(library)] = f"besa/kernels/{build.PREBUILT}/{library.name}"
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"  # ctypes loads the libraries, which know nothing of Python

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled."""
        if version != "editable":
            shutil.rmtree(self.folder)


def _build(sources: Path) -> Any:
    """The module `besa.kernels.build`, without its package, which imports torch."""
    sys.path.insert(0, str(sources))
    try:
        spec = importlib.util.spec_from_file_location("besa_kernels_build", sources / "besa" / "kernels" / "build.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(sources))
    return module
