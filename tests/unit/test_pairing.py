"""Accuracies of two models on the same questions, against NumPy and by hand."""

import math
import random

import numpy as np
import pytest

from besa.evaluation.pairing import against, paired
from besa.evaluation.zero_shot import Accuracy, ZeroShot


def answers(seed: int, questions: int, share: float = 0.6) -> str:
    chance = random.Random(seed)
    return "".join("1" if chance.random() < share else "0" for _ in range(questions))


def task(right: str | None, norm: str | None = None, asked: str | None = "a digest") -> Accuracy:
    shares = [one and one.count("1") / len(one) for one in (right, norm)]
    number = len(right or "0101")
    share, norm_share = shares[0] or 0.5, shares[1]
    return Accuracy(
        acc=share, acc_stderr=0.1, acc_norm=norm_share, questions=number, version=1, right=right, right_norm=norm,
        asked=asked,
    )  # fmt: skip


def found(bos: bool = False, **tasks: Accuracy) -> ZeroShot:
    mean = sum(one.acc for one in tasks.values()) / len(tasks)
    return ZeroShot(tasks=tasks, mean=mean, source="embedded", limit=None, bos=bos, lm_eval="0.4")


def test_wins_losses_and_the_error_by_hand() -> None:
    #                               .+-.-..+
    one = paired(["11000101"], "10101100")
    assert (one.won, one.lost, one.answers) == (2, 2, 8)
    assert one.difference == 0
    assert one.stderr == pytest.approx(math.sqrt(4 / 7 / 8))  # four changes of one, around a mean of nothing
    more = paired(["1110"], "1000")
    assert (more.won, more.lost, more.difference) == (2, 0, 0.5)
    assert more.stderr == pytest.approx(math.sqrt((2 - 4 / 4) / 3 / 4))
    same = paired(["0110"], "0110")
    assert (same.difference, same.stderr, same.won, same.lost) == (0, 0, 0, 0)
    assert paired(["1"], "0").stderr is None


@pytest.mark.parametrize("runs", [1, 3])
def test_the_error_is_that_of_the_mean_of_differences(runs: int) -> None:
    other, models = answers(0, 300), [answers(1 + run, 300, 0.5) for run in range(runs)]
    right, each = np.array([*map(int, other)]), np.array([[*map(int, one)] for one in models])
    differences = each.mean(axis=0) - right
    one = paired(models, other)
    assert one.difference == pytest.approx(differences.mean())
    assert one.stderr == pytest.approx(differences.std(ddof=1) / math.sqrt(300))
    assert (one.won, one.lost) == ((each > right).sum(), (each < right).sum())
    assert one.won - one.lost == each.sum() - runs * right.sum()
    assert one.answers == 300 * runs


def test_the_error_is_the_spread_over_draws_of_questions() -> None:
    """Of two models that answer nine questions of ten alike, and far below what both accuracies alone would say."""
    chance = np.random.default_rng(0)
    right = chance.random((4000, 200)) < 0.6
    changed = chance.random(right.shape) < 0.1
    model = np.where(changed, ~right, right)
    spread = (model.mean(axis=1) - right.mean(axis=1)).std()
    lines = [["".join("01"[int(one)] for one in draw) for draw in table[:50]] for table in (model, right)]
    errors = [paired([ours], theirs).stderr for ours, theirs in zip(*lines, strict=True)]
    assert np.mean([error for error in errors if error is not None]) == pytest.approx(spread, rel=0.05)
    unpaired = math.hypot(*(math.sqrt(share * (1 - share) / 200) for share in (model.mean(), right.mean())))
    assert spread < 0.6 * unpaired


def test_the_mean_over_tasks_counts_each_alike() -> None:
    dense = found(piqa=task(answers(0, 50)), boolq=task(answers(1, 200)))
    model = found(piqa=task(answers(2, 50)), boolq=task(answers(3, 200)))
    pairs = against([model], dense)
    assert pairs is not None
    assert pairs.mean is not None
    piqa, boolq = pairs.tasks["piqa"], pairs.tasks["boolq"]
    assert pairs.mean.difference == pytest.approx(model.mean - dense.mean)
    assert pairs.mean.stderr == pytest.approx(math.sqrt((piqa.stderr or 0) ** 2 + (boolq.stderr or 0) ** 2) / 2)
    assert (pairs.mean.won, pairs.mean.lost) == (piqa.won + boolq.won, piqa.lost + boolq.lost)
    assert pairs.mean.answers == 250
    single = against([found(piqa=task("1"), boolq=task("01"))], found(piqa=task("0"), boolq=task("01")))
    assert single is not None
    assert single.mean is not None
    assert single.mean.stderr is None


def test_accuracies_per_byte_are_paired_where_a_task_has_them() -> None:
    dense = found(piqa=task("0101", "0011"), boolq=task("0101"))
    model = found(piqa=task("0101", "0111"), boolq=task("0101"))
    pairs = against([model], dense, norm=True)
    assert pairs is not None
    assert pairs.tasks.keys() == {"piqa"}
    assert pairs.mean == pairs.tasks["piqa"] == paired(["0111"], "0011")


@pytest.mark.parametrize(
    "model",
    [
        found(piqa=task("0101", asked="another digest")),
        found(piqa=task("01011")),
        found(piqa=task(None, asked=None)),
        found(boolq=task("0101")),
        found(bos=True, piqa=task("0101")),
    ],
)
def test_only_the_same_questions_are_paired(model: ZeroShot) -> None:
    dense = found(piqa=task("0101"))
    assert against([dense], dense) is not None
    assert against([model], dense) is None
    assert against([dense, model], dense) is None
    assert against([dense], model) is None
    assert against([model], found(piqa=task(None, asked=None))) is None


def test_a_mean_needs_all_tasks() -> None:
    dense = found(piqa=task("0101"), boolq=task("0101"))
    for model in (found(piqa=task("0111")), found(piqa=task("0111"), boolq=task("0101", asked="another"))):
        for one, other in ((model, dense), (dense, model)):
            pairs = against([one], other)
            assert pairs is not None
            assert pairs.tasks.keys() == {"piqa"}
            assert pairs.mean is None
