"""`besa.simulate`: the cycles of an accelerator for sparse weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import InstanceOf

from besa.data.arguments import Count, checked
from besa.models.source import locate
from besa.progress import Progress, silent
from besa.simulator import Accelerator, Simulation
from besa.simulator import simulate as simulate_checkpoint


@checked
def simulate(
    model: str | Path,
    tokens: Sequence[Count] = (1, 8, 32, 128, 512),
    *,
    accelerator: InstanceOf[Accelerator] | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Simulation:
    """Count the cycles that an accelerator for sparse weights would take (section 4.5 and Table 4 of the paper).

    Args:
        model: Hugging Face id, local folder (dense, pruned, or with codes), .gguf file, or ``smollm2``.
        tokens: numbers of input vectors for the figures that include memory.
        accelerator: what is simulated, by default ViTCoD.
        trust_remote_code: run model code that comes with the checkpoint.
        progress: called with (blocks done, number of blocks, name of the block).

    Raises:
        BesaError: the model cannot be read, or a number of tokens is not positive.
    """
    source = locate(model, progress, trust_remote_code=trust_remote_code)
    return simulate_checkpoint(source, tokens, accelerator or Accelerator(), progress)
