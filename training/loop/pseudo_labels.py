"""Choose the predicted labels that a model is trained on again: the most certain, in the shares of the labelled rows.

Pure functions on arrays: N rows, K labels.
"""

import numpy as np
from numpy.typing import NDArray

from training.evaluation.decisions import Floats

# A label may have this many times its share of the labelled rows among the chosen ones.
MOST_SHARE = 1.25


def choose_rows(probabilities: Floats, threshold: float, shares: Floats) -> NDArray[np.intp]:
    """Return the indices of the rows to train on, in their order.

    Each has a label of at least `threshold` by `probabilities` (N, K). Of each label the most certain rows are taken,
    and no label has more than `MOST_SHARE` times its share among the chosen rows. `shares` (K,) sum to 1.
    """
    labels, certainty = probabilities.argmax(axis=1), probabilities.max(axis=1)
    certain = np.flatnonzero(certainty >= threshold)
    counts = np.bincount(labels[certain], minlength=probabilities.shape[1])
    chosen: list[int] = []
    for label, quota in enumerate(_quotas(counts, shares)):
        of_label = certain[labels[certain] == label]
        order = np.argsort(-certainty[of_label], kind="stable")
        chosen += of_label[order][:quota].tolist()
    return np.array(sorted(chosen), np.intp)


def _quotas(counts: NDArray[np.intp], shares: Floats) -> list[int]:
    """Return how many of `counts` (K,) certain rows to take of each label."""
    kept = counts
    while True:  # fewer rows of one label lower what the others may have
        fewer = np.minimum(kept, np.floor(MOST_SHARE * shares.astype(np.float64) * kept.sum() + 1e-9).astype(np.intp))
        if (fewer == kept).all():
            return [int(count) for count in kept]
        kept = fewer


def row_weights(probabilities: Floats, labelled: int, factor: float) -> Floats:
    """Return the weights (N,) in the loss of rows with predicted `probabilities` (N, K), at most 1 each.

    A row counts by its certainty: 1 for a probability of 1, 0 for that of chance. All together count at most `factor`
    times the `labelled` rows.
    """
    chance = 1 / probabilities.shape[1]
    certainty = (probabilities.max(axis=1) - chance) / (1 - chance)
    return np.asarray(certainty * min(factor, factor * labelled / max(certainty.sum(), 1e-9)), np.float32)
