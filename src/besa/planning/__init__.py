"""Planning: what a run needs (`plan`): forward passes, peak memory, shapes of a pass, and traffic between ranks."""

from besa.planning.passes import forward_passes, spending
from besa.planning.plan import Plan, work_out

__all__ = ["Plan", "forward_passes", "spending", "work_out"]
