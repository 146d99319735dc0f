"""Fine-tuning: may the kept weights of a block change together, to bring its output closer to the dense path's?

Each file holds one method. Its settings class is the method. `tune` returns new weights of a block (`problem`), and
leaves the block itself as it is.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from besa.methods.finetuning.adam import MaskedAdam
from besa.methods.finetuning.none import NoFinetuning
from besa.methods.finetuning.problem import Finetuned, FinetuningProblem

Finetuning = Annotated[NoFinetuning | MaskedAdam, Field(discriminator="method")]

__all__ = ["Finetuned", "Finetuning", "FinetuningProblem", "MaskedAdam", "NoFinetuning"]
