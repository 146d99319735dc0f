"""All sizes of the experiments: the paper's, those that a processor can bear, and those of the tests."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """How much is calibrated on and measured; the defaults are the paper's.

    Attributes:
        samples: calibration sequences.
        seqlen: tokens of each.
        window: tokens of an evaluation window.
        max_windows: of each text, None for all.
        questions: of each zero-shot task, None for all; 0 where none is asked.
        seeds: runs of each case; a seed chooses other sequences.
        dtype: of the model.
        points: what is varied, where that differs from the paper; empty for the paper's points.
    """

    samples: int = 128
    seqlen: int = 2048
    window: int = 2048
    max_windows: int | None = None
    questions: int | None = None
    seeds: int = 1
    dtype: str = "auto"
    points: tuple[float, ...] = ()

    @property
    def words(self) -> str:
        """All of them, for readers of a result."""
        return ", ".join(
            f"{field.name} {'all' if value is None else value}"
            for field in fields(self)
            if (value := getattr(self, field.name)) not in ((), 0)
        )


PAPER = Sizes()
CPU = Sizes(32, 512, 512, 20, 1000, 3, "bfloat16")
SMALL = Sizes(4, 32, 32, 4, 2, 2)
SIZES = {"paper": PAPER, "cpu": CPU, "small": SMALL}
# What an experiment, or a model, has in place of the sizes above.
OF_EXPERIMENT: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "table2": {"seeds": 1},  # 6,000 questions decide, paired; a model takes long to answer them
        "table3": {"samples": 64, "max_windows": 40},
        "front": {"samples": 64, "max_windows": 40},
        "domains": {"samples": 16, "max_windows": 10},
        "fig1b": {"points": (0.3, 0.5, 0.7, 0.9)},
        "batches-tiny-50": {"samples": 64, "seqlen": 128, "window": 128, "max_windows": 200, "dtype": "auto"},
        "batches-tiny-70": {"samples": 64, "seqlen": 128, "window": 128, "max_windows": 200, "dtype": "auto"},
        "batches-tiny-finetune": {"samples": 64, "seqlen": 128, "window": 128, "max_windows": 200, "dtype": "auto"},
        "batches-smollm2-50": {"seqlen": 256, "window": 256, "max_windows": 40, "dtype": "auto"},
        "batches-smollm2-finetune": {"seqlen": 128, "window": 256, "max_windows": 40, "dtype": "auto"},
    },
    "small": {
        "fig1b": {"points": (0.9,)},
        "fig3": {"points": (0.6, 0.9)},
        "fig4": {"points": (2.0, 4.0)},
        "table5": {"points": (1.0, 2.0)},
        "beyond": {"points": (0.6,)},
    },
}
OF_MODEL: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {"qwen2.5-coder-1.5b": {"samples": 16, "max_windows": 10}},
}


def sizes(preset: str, experiment: str, model: str) -> Sizes:
    """The sizes of an experiment on a model."""
    changes = OF_EXPERIMENT.get(preset, {}).get(experiment, {}) | OF_MODEL.get(preset, {}).get(model, {})
    return replace(SIZES[preset], **changes)
