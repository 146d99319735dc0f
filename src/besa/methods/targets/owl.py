"""OWL: blocks with more outliers lose fewer weights (Yin et al., 2024, arXiv 2310.05175).

Shape suffixes: O rows, I columns.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from besa.methods.survey import Survey
from besa.methods.targets.bounded import Bounded
from besa.observing.input_statistics import collect


class Owl(Bounded):
    """The outlier ratio of a block is its share of weights whose |W|·‖x‖ is above `outlier` times the block's mean.

    Sparsities fall linearly with the outlier ratio. The highest and the lowest differ by `span`.
    """

    method: Literal["owl"] = "owl"
    outlier: float = Field(default=5.0, gt=1, description="M: an outlier is above so many times the mean")
    span: float = Field(default=0.16, ge=0, le=1, description="2λ: difference of the highest and the lowest target")

    @property
    def forwards(self) -> int:
        """One of the dense model."""
        return 1

    @property
    def paths(self) -> int:
        """One, at one block."""
        return 1

    def measure(self, survey: Survey) -> list[float]:
        """A sparsity for each block, from a forward pass of the dense model."""
        decoder, ratios = survey.decoder, []
        x_NTC = survey.embedded(self.tokens(survey))
        for block, names, size in zip(decoder.blocks, survey.names, survey.sizes, strict=True):
            with survey.opened(block):
                with collect(block.module, block.prunables, gram=False) as statistics:
                    block.run(x_NTC, survey.batch, into=x_NTC)
                scores = [(block.weight(name), statistics[name].squares_I) for name in names]
                mean = torch.stack([_score(*one).sum() for one in scores]).sum() / size if scores else 0.0
                outliers = [(_score(*one) > self.outlier * mean).sum() for one in scores]
            ratios.append(sum(torch.stack(outliers).tolist()) / size if outliers else 0.0)
        spread = max(ratios) - min(ratios)
        return [survey.sparsity - self.span * (ratio - min(ratios)) / max(spread, 1e-12) for ratio in ratios]


def _score(w_OI: Tensor, squares_I: Tensor) -> Tensor:
    """|W|·‖x‖ (O, I), float32, from the squared norms of the inputs; zero in an expert that no token reached."""
    return w_OI.float().abs() * squares_I.sqrt().float()
