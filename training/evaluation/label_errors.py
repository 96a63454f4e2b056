"""Find labels that are probably wrong, by confident learning (Northcutt et al., 2021), with the package cleanlab."""

import warnings

import numpy as np

from training.errors import LabelCheckUnavailable
from training.evaluation.decisions import Floats


def require_cleanlab() -> None:
    """Raise `LabelCheckUnavailable` when the package is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import cleanlab.filter  # noqa: F401
        except ImportError as error:
            raise LabelCheckUnavailable(
                f"finding wrong labels needs cleanlab ({error}); `pip install 'tweetscore[labels]'`"
            ) from error


def rank_label_errors(targets: Floats, probabilities: Floats, task: str) -> list[int]:
    """Return the rows whose label is probably wrong, by rising probability of the given label.

    `targets` and `probabilities` (N, K), N at least 1; the probabilities should come from models that were not trained
    on the row. For multi_label a row counts when one of its labels is probably wrong or missing. Raises
    `LabelCheckUnavailable`.
    """
    require_cleanlab()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about labels with few rows
        from cleanlab.filter import find_label_issues
        from cleanlab.multilabel_classification.filter import find_label_issues as find_multi_label_issues

        # In this process: the parallel version forks, and is faster only for millions of rows.
        options = {"return_indices_ranked_by": "self_confidence", "n_jobs": 1}
        if task == "multi_label":
            of_rows = [np.flatnonzero(row).tolist() for row in targets]
            return list(map(int, find_multi_label_issues(of_rows, probabilities, **options)))
        return list(map(int, find_label_issues(targets.argmax(axis=1), probabilities, **options)))


def label_probabilities(labels: Floats, probabilities: Floats, task: str) -> Floats:
    """Return the probability (N,) of each row's `labels` (N, K), which are zeros and ones.

    For multi_label that of the least certain decision.
    """
    if task == "multi_label":
        return np.asarray(np.where(labels == 1, probabilities, 1 - probabilities).min(axis=1))
    return np.asarray((labels * probabilities).sum(axis=1))
