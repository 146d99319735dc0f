"""No fine-tuning."""

from __future__ import annotations

from typing import Literal

from besa.methods.finetuning.finetuner import Finetuner
from besa.methods.finetuning.problem import Finetuned, FinetuningProblem


class NoFinetuning(Finetuner):
    """Weights stay as the reconstruction left them; `finetune.method=none`."""

    method: Literal["none"] = "none"

    def tune(self, problem: FinetuningProblem) -> Finetuned:
        """Change nothing: return no weights and no losses."""
        return Finetuned()
