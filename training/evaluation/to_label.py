"""Pick the texts that are worth labelling next."""

from collections.abc import Sequence

import numpy as np

from training.evaluation.decisions import Floats
from training.text.cleaning import clean

# As in cluster-margin sampling (Citovsky et al., 2021): of this many times the wanted number, the least certain, one
# of each cluster is taken. Without the clusters the same kind of text is labelled again and again.
CANDIDATES = 4
FEATURES = 64


def pick_to_label(texts: Sequence[str], probabilities: Floats, count: int, seed: int = 0) -> list[int]:
    """Return the indices of `count` texts that are uncertain and unlike each other, the least certain first.

    `probabilities` (N, K) of single labels. Uncertainty is the margin between the two most probable labels. Similar
    texts are found by the character n-grams of TF-IDF. Returns all indices when there are no more than `count` texts.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    best = np.sort(probabilities, axis=1)
    margin = best[:, -1] - best[:, -2]
    candidates = np.argsort(margin, kind="stable")[: CANDIDATES * count]
    if len(candidates) <= count:
        return [int(i) for i in candidates]
    vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True).fit_transform(
        [clean(texts[i]) for i in candidates]
    )
    size = min(FEATURES, vectors.shape[1] - 1, len(candidates) - 1)
    if size > 1:
        vectors = normalize(TruncatedSVD(size, random_state=seed).fit_transform(vectors))
    clusters = KMeans(count, n_init=1, random_state=seed).fit_predict(vectors)
    first: dict[int, int] = {}  # the least certain of each cluster, since candidates are sorted
    for position, cluster in enumerate(clusters):
        first.setdefault(int(cluster), position)
    taken = sorted(first.values())
    rest = [position for position in range(len(candidates)) if position not in set(taken)]
    return [int(candidates[position]) for position in sorted(taken + rest[: count - len(taken)])]
