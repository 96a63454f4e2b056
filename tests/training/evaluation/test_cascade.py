"""The threshold of a cascade: its curve against scikit-learn and by hand, the choice, and the calibration."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from training.evaluation.bootstrap import resamples
from training.evaluation.calibration import log_loss
from training.evaluation.cascade import (
    BOOTSTRAP,
    ESTIMATE,
    NoThreshold,
    Point,
    cascade_curve,
    choose_threshold,
    fit_temperatures,
)
from training.evaluation.decisions import Floats, highest

ROWS = 120


def softmax(logits: Floats) -> Floats:
    powers = np.exp(logits)
    probabilities: Floats = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    return probabilities


@pytest.fixture(scope="module")
def rows() -> tuple[Floats, Floats, Floats]:
    """Targets, and the logits of a student and of a better teacher."""
    generator = np.random.default_rng(0)
    targets = np.eye(3, dtype=np.float32)[generator.integers(0, 3, ROWS)]
    student, teacher = (scale * targets + generator.normal(size=(ROWS, 3)) for scale in (1.5, 3.0))
    return targets, student.astype(np.float32), teacher.astype(np.float32)


def test_each_point_of_the_curve_is_what_the_combined_labels_give(rows: tuple[Floats, Floats, Floats]) -> None:
    targets, student, teacher = rows[0], softmax(rows[1]), softmax(rows[2])
    curve = cascade_curve(targets, student, teacher, seed=3)
    assert (curve[0].threshold, curve[0].share) == (0.0, 0.0)
    assert len(curve) > 80
    assert curve[-1].share == pytest.approx(0.9)
    assert [point.share for point in curve] == sorted({point.share for point in curve})
    actual, of_teacher = targets.argmax(1), teacher.argmax(1)
    for point in curve[::20]:
        passed = highest(student) < point.threshold
        decided = np.where(passed, of_teacher, student.argmax(1))
        assert point.share == passed.mean()
        assert point.f1_macro == pytest.approx(f1_score(actual, decided, average="macro"))
        assert point.ratio == pytest.approx(point.f1_macro / f1_score(actual, of_teacher, average="macro"))
    drawn = [np.repeat(np.arange(ROWS), counts.astype(int)) for many in resamples(ROWS, 3) for counts in many]
    ratios = [
        f1_score(actual[i], decided[i], average="macro") / f1_score(actual[i], of_teacher[i], average="macro")
        for i in drawn[:100]
    ]
    assert curve[80].ratio_low == pytest.approx(np.percentile(ratios, 5), abs=0.015)


def test_the_smallest_share_is_taken_from_which_on_all_keep_enough() -> None:
    ratios = [(0.80, 0.70), (0.99, 0.90), (0.97, 0.93), (0.98, 0.97), (1.00, 0.99)]
    curve = [Point(i / 10, i / 5, 0.5, ratio, low) for i, (ratio, low) in enumerate(ratios)]
    assert choose_threshold(curve, 0.98, ESTIMATE) is curve[3]  # the second keeps enough, and the third does not
    assert choose_threshold(curve, 0.98, BOOTSTRAP) is curve[4]
    assert choose_threshold(curve, 0.5, BOOTSTRAP) is curve[0]
    with pytest.raises(NoThreshold, match=r"with 80% passed on the ratio is 1\.0000, its lower bound 0\.9900; lower"):
        choose_threshold(curve, 0.995, BOOTSTRAP)


def test_the_temperatures_calibrate_the_whole_and_change_no_label(rows: tuple[Floats, Floats, Floats]) -> None:
    targets, student, teacher = rows[0], 4 * rows[1], 4 * rows[2]  # much too sure
    passed = highest(softmax(student)) < 0.9
    assert 0.1 < passed.mean() < 0.9
    found = fit_temperatures(targets, student, teacher, passed)

    def whole(of_student: float, of_teacher: float) -> Floats:
        return np.where(passed[:, None], softmax(teacher / of_teacher), softmax(student / of_student))

    before, after = whole(1, 1), whole(found.student, found.teacher)
    assert min(found.student, found.teacher) > 1.1
    assert log_loss(targets, after, "single_label") < 0.8 * log_loss(targets, before, "single_label")
    assert (before.argmax(1) == after.argmax(1)).all()
    assert fit_temperatures(targets, student, teacher, np.zeros(ROWS, bool)).teacher == 1.0
