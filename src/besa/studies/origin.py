"""The origin of a result: the versions and the machine that its numbers depend on."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from besa.system.devices import resolve_device
from besa.system.machine import machine, versions


class Origin(BaseModel):
    """Versions and machine. Only results of the same origin are compared or used again; others are shown as such.

    Attributes:
        versions: of besa and of the packages that its numbers depend on.
        machine: processor, threads, GPU and kernels, as in run records.
    """

    versions: dict[str, str]
    machine: dict[str, Any]

    @classmethod
    def here(cls, device: str) -> Origin:
        """Origin of results that are computed here on a device, without Python's version, which changes no number.

        Raises:
            BesaError: there is no such device here.
        """
        packages = {name: version for name, version in versions().items() if name != "python"}
        return cls(versions=packages, machine=machine(resolve_device(device)))

    @property
    def label(self) -> str:
        """Versions and machine in words, as far as they are known."""
        packages = ", ".join(f"{name} {version}" for name, version in self.versions.items() if name != "python")
        processor = self.machine.get("gpu") or self.machine.get("processor")
        threads = self.machine.get("threads")
        counted = f", {threads} thread{'' if threads == 1 else 's'}" if threads else ""
        return f"{packages or 'an unknown besa'} on {processor or 'an unknown machine'}{counted}"
