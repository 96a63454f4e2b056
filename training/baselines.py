"""What is reached without a transformer on the same rows: a fine-tuned model should stand above it.

A large dataset costs it no more memory than one of `MOST_CHARACTERS`: a part of the rows is fitted on, drawn by the
seed, and said.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.multiclass import OneVsRestClassifier

from db.errors import LeaseLost
from training import failpoint
from training.dataset import Dataset, Split
from training.decide import Floats, choose
from training.errors import Cancelled, StopRequested
from training.evaluate import Figures, metrics

log = logging.getLogger(__name__)

# Regularisation strengths that are tried; the validation rows choose.
STRENGTHS = (1.0, 10.0, 100.0)
# Of the texts held as features at a time: four occurrences a character, each perhaps a feature of its own.
MOST_CHARACTERS = 2_000_000
# Features times labels: the solver holds some thirty numbers of 8 bytes for each.
MOST_WEIGHTS = 5_000_000


def baselines(
    data: Dataset, task: str, seed: int = 0, check: Callable[[], None] = lambda: None
) -> tuple[Figures, list[str]]:
    """Test figures of both, under `majority_` and `tfidf_`, and what there is to say of them.

    One that fails has no figures and a note. `check` is called now and then and may raise to stop.
    """
    figures: Figures = {}
    notes: list[str] = []
    asked: dict[str, Callable[[], tuple[Floats, list[str]]]] = {
        "majority": lambda: (majority(data.train, data.test), []),
        "tfidf": lambda: tfidf(data.train, data.valid, data.test, task, seed, check),
    }
    for name, ask in asked.items():
        try:
            failpoint.passing("baseline", [name])
            said, found = ask()
            of_rows = metrics(data.test.targets, said, data.labels, task)
        except (Cancelled, StopRequested, LeaseLost):
            raise
        except Exception as error:  # it is there to be looked at beside the model, and costs it nothing
            log.warning("the %s baseline failed (%s); the model has no such figures beside it", name, _kind(error))
            notes.append(f"the {name} baseline failed ({_kind(error)}); the model has no such figures beside it")
            continue
        notes += found
        figures |= {
            (f"{name}_{metric}", label): value for (metric, label), value in of_rows.items() if metric != "support"
        }
    return figures, notes


def majority(train: Split, test: Split) -> Floats:
    """Test probabilities (N, K) of a model that reads nothing: how often the training rows have each label."""
    return np.tile(train.targets.mean(axis=0), (len(test), 1)).astype(np.float32)


def tfidf(
    train: Split, valid: Split, test: Split, task: str, seed: int = 0, check: Callable[[], None] = lambda: None
) -> tuple[Floats, list[str]]:
    """Test probabilities (N, K) of TF-IDF, characters 1 to 4, with logistic regression, C by validation macro-F1.

    And what was left out, if anything was.
    """
    fitted, chosen_by = _some(train, seed), _some(valid, seed)
    labels = train.targets.shape[1]
    most = max(1, MOST_WEIGHTS // labels)
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True, max_features=most)
    x_train = vectorizer.fit_transform(fitted.texts)
    x_valid = vectorizer.transform(chosen_by.texts)
    best: tuple[float, Any] | None = None
    for strength in STRENGTHS:
        check()
        model: Any = LogisticRegression(C=strength, max_iter=1000)
        if task == "multi_label":
            model = OneVsRestClassifier(model)
        model.fit(x_train, fitted.targets if task == "multi_label" else fitted.targets.argmax(axis=1))
        scored = _said(model, x_valid, labels)
        quality = float(f1_score(chosen_by.targets, choose(scored, task), average="macro", zero_division=0))
        if best is None or quality > best[0]:
            best = quality, model
    assert best is not None  # noqa: S101 - STRENGTHS is not empty
    del x_train, x_valid
    said = [_said(best[1], vectorizer.transform(texts), labels) for texts in _portions(test.texts)]
    features = len(vectorizer.vocabulary_)
    return np.concatenate(said), _left_out(train, fitted, features if features == most else None)


def _some(split: Split, seed: int) -> Split:
    """The rows of a split, or as many of them, drawn by the seed, as have `MOST_CHARACTERS`."""
    sizes = np.array([len(text) for text in split.texts], dtype=np.int64)
    if sizes.sum() <= MOST_CHARACTERS:
        return split
    drawn = np.random.default_rng(seed).permutation(len(sizes))
    kept = np.sort(drawn[: int(np.searchsorted(sizes[drawn].cumsum(), MOST_CHARACTERS, side="right"))])
    return Split([split.texts[i] for i in kept], split.targets[kept], [split.row_numbers[i] for i in kept])


def _portions(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in order, in lists of up to `MOST_CHARACTERS` each, or of one text."""
    begin = characters = 0
    for end, text in enumerate(texts):
        if characters + len(text) > MOST_CHARACTERS and end > begin:
            yield texts[begin:end]
            begin, characters = end, 0
        characters += len(text)
    yield texts[begin:]


def _said(model: Any, features: Any, labels: int) -> Floats:
    """Probabilities (N, K); 0 of a label that no row had which the model was fitted on."""
    found = np.asarray(model.predict_proba(features), dtype=np.float32)
    if found.shape[1] == labels:
        return found
    said: NDArray[np.float32] = np.zeros((len(found), labels), dtype=np.float32)
    said[:, model.classes_] = found
    return said


def _left_out(train: Split, fitted: Split, features: int | None) -> list[str]:
    rows = f"{len(fitted):,} of {len(train):,} training rows, drawn by the seed" if len(fitted) < len(train) else ""
    taken = f"the {features:,} most frequent features" if features is not None else ""
    if not rows and not taken:
        return []
    return [f"the tfidf baseline was bounded to {' and '.join(filter(None, (rows, taken)))}, to spare memory"]


def _kind(error: Exception) -> str:
    """Without its words, which may quote the dataset."""
    return type(error).__name__
