"""Planning: what a run needs (`plan`): forward passes, peak memory, shapes of a pass, and traffic between ranks."""

from besa.planning.passes import forward_passes, spending, within
from besa.planning.plan import Plan, work_out
from besa.planning.whole import check_fits, whole_disk_bytes

__all__ = ["Plan", "check_fits", "forward_passes", "spending", "whole_disk_bytes", "within", "work_out"]
