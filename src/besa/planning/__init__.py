"""Planning: what a run needs (`plan`): passes, hidden states, peak memory, disk, and traffic between ranks.

`explaining` puts recipes into words.
"""

from besa.planning.enough import few_tokens
from besa.planning.explaining import Explanation, RecipeList, explain, list_recipes
from besa.planning.outline import Outline
from besa.planning.passes import forward_passes, spending, within
from besa.planning.plan import Plan, work_out
from besa.planning.suiting import check_suits
from besa.planning.whole import coded_bytes, whole_disk_bytes

__all__ = [
    "Explanation",
    "Outline",
    "Plan",
    "RecipeList",
    "check_suits",
    "coded_bytes",
    "explain",
    "few_tokens",
    "forward_passes",
    "list_recipes",
    "spending",
    "whole_disk_bytes",
    "within",
    "work_out",
]
