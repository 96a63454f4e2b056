"""How good an epoch's weights are. It does not use scikit-learn, so that training starts without it."""

import numpy as np

from training.evaluation.decisions import Floats, choose


def epoch_quality(targets: Floats, probabilities: Floats, task: str) -> tuple[float, float]:
    """Return accuracy and macro-F1 of the validation rows, 0 to 1; `targets` and `probabilities` (N, K).

    For a continuous task R^2 and D^2, both at least 0. D^2 is the share of the absolute error around the median that a
    model removes, so it is highest where the mean absolute error is lowest.
    """
    if task == "continuous":
        if len(targets) < 2:
            return 0.0, 0.0
        actual, error = (np.asarray(array, np.float64) for array in (targets, targets - probabilities))
        squared = _share_explained((error**2).sum(), ((actual - actual.mean()) ** 2).sum())
        return squared, _share_explained(np.abs(error).sum(), np.abs(actual - np.median(actual)).sum())
    truth, chosen = targets.astype(np.int64), choose(probabilities, task)
    hits, both = (truth * chosen).sum(axis=0), truth.sum(axis=0) + chosen.sum(axis=0)
    return float((truth == chosen).all(axis=1).mean()), float((2 * hits / both.clip(min=1)).mean())


def _share_explained(error: float, spread: float) -> float:
    """At least 0; without any spread 1 when there is no error."""
    return max(0.0, float(1 - error / spread)) if spread else float(not error)
