"""No distilling."""

from __future__ import annotations

from typing import Literal

from besa.methods.distilling.distiller import Distiller
from besa.methods.distilling.snapshots import Snapshots
from besa.methods.distilling.student import Distilled, Student
from besa.progress import Progress


class NoDistilling(Distiller):
    """The model stays as its blocks were pruned; `distill.method=none`."""

    method: Literal["none"] = "none"

    def distill(self, student: Student, snapshots: Snapshots, progress: Progress) -> Distilled:
        """Change nothing, and return no losses."""
        return Distilled()
