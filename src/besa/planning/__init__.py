"""Planning: what a run will take (`plan`): passes, memory by phases (`peak`), and what each pass keeps (`shapes`)."""

from besa.planning.passes import forward_passes, spending
from besa.planning.plan import Plan, work_out

__all__ = ["Plan", "forward_passes", "spending", "work_out"]
