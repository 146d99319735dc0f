"""besa: prune large language models block by block, with learned and exact sparsity."""

from besa.api import Compressed, Evaluation, compress, evaluate
from besa.calibration import Calibration
from besa.errors import BesaError
from besa.recipe import Recipe
from besa.version import __version__

__all__ = ["BesaError", "Calibration", "Compressed", "Evaluation", "Recipe", "__version__", "compress", "evaluate"]
