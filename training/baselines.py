"""What is reached without a transformer on the same rows: a fine-tuned model should stand above it."""

from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.multiclass import OneVsRestClassifier

from training.data import Dataset, Split
from training.decide import Floats, choose
from training.evaluate import Figures, metrics

# Regularisation strengths that are tried; the validation rows choose.
STRENGTHS = (1.0, 10.0, 100.0)


def baselines(data: Dataset, task: str) -> Figures:
    """Test figures of both, under `majority_` and `tfidf_`."""
    figures: Figures = {}
    for name, said in (
        ("majority", majority(data.train, data.test)),
        ("tfidf", tfidf(data.train, data.valid, data.test, task)),
    ):
        found = metrics(data.test.targets, said, data.labels, task)
        figures |= {
            (f"{name}_{metric}", label): value for (metric, label), value in found.items() if metric != "support"
        }
    return figures


def majority(train: Split, test: Split) -> Floats:
    """Test probabilities (N, K) of a model that reads nothing: how often the training rows have each label."""
    return np.tile(train.targets.mean(axis=0), (len(test), 1)).astype(np.float32)


def tfidf(train: Split, valid: Split, test: Split, task: str) -> Floats:
    """Test probabilities (N, K) of TF-IDF, characters 1 to 4, with logistic regression, C by validation macro-F1."""
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True)
    x_train = vectorizer.fit_transform(train.texts)
    x_valid, x_test = vectorizer.transform(valid.texts), vectorizer.transform(test.texts)
    best: tuple[float, Floats] | None = None
    for strength in STRENGTHS:
        model: Any = LogisticRegression(C=strength, max_iter=1000)
        if task == "multi_label":
            model = OneVsRestClassifier(model)
        model.fit(x_train, train.targets if task == "multi_label" else train.targets.argmax(axis=1))
        scored = np.asarray(model.predict_proba(x_valid), dtype=np.float32)
        quality = float(f1_score(valid.targets, choose(scored, task), average="macro", zero_division=0))
        if best is None or quality > best[0]:
            best = (quality, np.asarray(model.predict_proba(x_test), dtype=np.float32))
    assert best is not None  # noqa: S101 - STRENGTHS is not empty
    return best[1]
