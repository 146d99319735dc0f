"""Planning: what a run will take (`plan`): memory by phases (`peak`), and of forward and backward passes (`shapes`)."""

from besa.planning.plan import Plan, work_out

__all__ = ["Plan", "work_out"]
