"""Baselines without a transformer, on the same rows: a fine-tuned model should exceed them.

Memory is bounded: a dataset of more than `MAX_CHARACTERS` is fitted on a random sample, and a note reports it.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier

from db.errors import LeaseLost
from training import failpoint
from training.data.dataset import Dataset, Split
from training.errors import Cancelled, StopRequested
from training.evaluation.decisions import Floats
from training.evaluation.epoch_quality import epoch_quality
from training.evaluation.metrics import Figures, metrics

log = logging.getLogger(__name__)

# Values of scikit-learn's `C`, the inverse regularisation strength. Chosen on the validation rows.
STRENGTHS = (1.0, 10.0, 100.0)
# Characters of text converted to features at a time: each character occurs in four n-grams.
MAX_CHARACTERS = 2_000_000
# Features times labels: the solver needs about 30 float64 values for each.
MAX_WEIGHTS = 5_000_000


def baselines(
    data: Dataset, task: str, seed: int = 0, check: Callable[[], None] = lambda: None
) -> tuple[Figures, list[str]]:
    """Return the test figures of both baselines, prefixed `majority_` and `tfidf_`, and notes about them.

    A baseline that fails yields a note and no figures. `check` is called between fits and may raise `Cancelled`,
    `StopRequested` or `LeaseLost`.
    """
    figures: Figures = {}
    notes: list[str] = []
    fits: dict[str, Callable[[], tuple[Floats, list[str]]]] = {
        "majority": lambda: (majority(data.train, data.test, task), []),
        "tfidf": lambda: tfidf(data.train, data.valid, data.test, task, seed, check),
    }
    for name, fit in fits.items():
        try:
            failpoint.passing("baseline", [name])
            probabilities, fit_notes = fit()
            of_rows = metrics(data.test.targets, probabilities, data.labels, task, data.scale)
        except (Cancelled, StopRequested, LeaseLost):
            raise
        except Exception as error:  # a baseline is for comparison only, so its failure does not fail the job
            note = f"the {name} baseline failed ({_class_name(error)}); its figures are missing"
            log.warning("%s", note)
            notes.append(note)
            continue
        notes += fit_notes
        figures |= {
            (f"{name}_{metric}", label): value for (metric, label), value in of_rows.items() if metric != "support"
        }
    return figures, notes


def majority(train: Split, test: Split, task: str = "single_label") -> Floats:
    """Return test probabilities (N, K): for every row, the share of training rows that have each label.

    For ordinal 1 for the most frequent level, which need not be the median. For continuous the mean, an output (N, 1).
    """
    shares = train.targets.mean(axis=0)
    if task == "ordinal":
        shares = shares == shares.max()
    return np.tile(shares, (len(test), 1)).astype(np.float32)


def tfidf(
    train: Split, valid: Split, test: Split, task: str, seed: int = 0, check: Callable[[], None] = lambda: None
) -> tuple[Floats, list[str]]:
    """Return test probabilities (N, K) of TF-IDF with logistic regression, and notes on rows or features left out.

    Features are character n-grams, n = 1 to 4. `C` is chosen by validation macro-F1. For continuous ridge regression
    returns outputs (N, 1), and its strength is chosen by the validation mean absolute error, through D^2.
    """
    fitted, selection = _sample(train, seed), _sample(valid, seed)
    labels = train.targets.shape[1]
    max_features = max(1, MAX_WEIGHTS // labels)
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True, max_features=max_features)
    x_train = vectorizer.fit_transform(fitted.texts)
    x_valid = vectorizer.transform(selection.texts)
    best: tuple[float, Any] | None = None
    model = None
    for strength in STRENGTHS:
        check()
        model = _fitted(strength, x_train, fitted.targets, task, model)
        _, quality = epoch_quality(selection.targets, _probabilities(model, x_valid, labels, task), task)
        if best is None or quality > best[0]:
            best = quality, model
    assert best is not None  # noqa: S101 - STRENGTHS is not empty
    del x_train, x_valid
    tested = [_probabilities(best[1], vectorizer.transform(texts), labels, task) for texts in _chunks(test.texts)]
    features = len(vectorizer.vocabulary_)
    return np.concatenate(tested), _limits(train, fitted, features if features == max_features else None)


def _fitted(strength: float, features: Any, targets: Floats, task: str, before: Any = None) -> Any:
    """Fit the classifier of a task; `strength` is scikit-learn's `C`, or for ridge regression 10 / alpha.

    A classifier of one label per row starts from the weights of the strength `before`: half the time.
    """
    if task == "continuous":
        return Ridge(alpha=10 / strength).fit(features, targets[:, 0])
    if task == "multi_label":
        return OneVsRestClassifier(LogisticRegression(C=strength, max_iter=1000)).fit(features, targets)
    model = copy(before) if before is not None else LogisticRegression(max_iter=1000, warm_start=True)
    model.set_params(C=strength)
    return model.fit(features, targets.argmax(axis=1))


def _sample(split: Split, seed: int) -> Split:
    """Return the rows of a split, or a random sample of at most `MAX_CHARACTERS` characters."""
    sizes = np.array([len(text) for text in split.texts], dtype=np.int64)
    if sizes.sum() <= MAX_CHARACTERS:
        return split
    drawn = np.random.default_rng(seed).permutation(len(sizes))
    kept = np.sort(drawn[: int(np.searchsorted(sizes[drawn].cumsum(), MAX_CHARACTERS, side="right"))])
    return Split([split.texts[i] for i in kept], split.targets[kept], [split.row_numbers[i] for i in kept])


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield the texts in order, in chunks of at most `MAX_CHARACTERS` characters or of one text."""
    begin = characters = 0
    for end, text in enumerate(texts):
        if characters + len(text) > MAX_CHARACTERS and end > begin:
            yield texts[begin:end]
            begin, characters = end, 0
        characters += len(text)
    yield texts[begin:]


def _probabilities(model: Any, features: Any, labels: int, task: str) -> Floats:
    """Return probabilities (N, K), 0 for labels that are absent from the rows the model was fitted on."""
    if task == "continuous":
        return np.asarray(model.predict(features), dtype=np.float32)[:, None]
    found = np.asarray(model.predict_proba(features), dtype=np.float32)
    if found.shape[1] == labels:
        return found
    probabilities: NDArray[np.float32] = np.zeros((len(found), labels), dtype=np.float32)
    probabilities[:, model.classes_] = found
    return probabilities


def _limits(train: Split, fitted: Split, features: int | None) -> list[str]:
    """Return a note when rows or features were left out. `features` is None when all were used."""
    rows = (
        f"{len(fitted):,} of {len(train):,} training rows, sampled with the job's seed"
        if len(fitted) < len(train)
        else ""
    )
    kept = f"the {features:,} most frequent features" if features is not None else ""
    if not rows and not kept:
        return []
    return [f"the tfidf baseline was limited to {' and '.join(filter(None, (rows, kept)))}, to bound its memory"]


def _class_name(error: Exception) -> str:
    """Return the exception's class name only: its message can quote the dataset."""
    return type(error).__name__
