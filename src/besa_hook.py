"""Registering besa with transformers, whichever of the two is imported first.

`import besa` calls `install`. For programs that never import besa, torch does: it calls what packages name under the
entry point `torch.backends`, at the end of `import torch`. An exception would break that import, so none may leave.
This module stands outside the package and imports only the standard library, so that torch waits for nothing else.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"  # the module that knows quantisers by their name in config.json
QUANTIZERS = ("besa.integrations.quantizer", "besa.integrations.widths")  # modules that register one each
SWITCH = "BESA_AUTOLOAD"  # environment variable: 0 keeps besa out of programs that do not import it


def autoload() -> None:
    """Install the hook in a program that does not import besa, unless the environment forbids it; never raises."""
    if os.environ.get(SWITCH) != "0":
        install()


def install() -> None:
    """Register besa's quantisers with transformers: now, or as soon as transformers is imported; never raises."""
    if _imported():
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting:
    """A finder that finds no module, but waits for the registry to be imported, then registers and removes itself."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of the registry. Return None for every other module, so that Python finds it as usual."""
        if _imported():  # its import began before this finder came, if it is what imported torch
            self._leave()
            _register()
        elif name == REGISTRY:
            self._leave()
            spec = find_spec(name)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = partial(_execute, spec.loader.exec_module)  # type: ignore[method-assign]
            return spec
        return None

    def _leave(self) -> None:
        with suppress(ValueError):  # another thread's import was faster
            sys.meta_path.remove(self)


def _execute(original: Callable[[ModuleType], None], module: ModuleType) -> None:
    original(module)
    _register()


def _imported() -> bool:
    """Whether the registry is imported, to its end."""
    spec = getattr(sys.modules.get(REGISTRY), "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)


def _register() -> None:
    try:
        for module in QUANTIZERS:
            import_module(module)
    except Exception as error:
        warnings.warn(
            f"besa could not register with transformers, so its own formats do not load: {error}", stacklevel=2
        )
