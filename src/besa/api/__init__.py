"""The public functions: what the command line does, without the terminal."""

from besa.api.choosing import default_batch
from besa.api.compressing import Compressed, compress
from besa.api.evaluating import evaluate
from besa.api.forecasting import plan
from besa.api.simulating import simulate

__all__ = ["Compressed", "compress", "default_batch", "evaluate", "plan", "simulate"]
