"""From a model and rows to figures: predict, metrics, confusion, and the baseline beside them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support
from sklearn.multiclass import OneVsRestClassifier
from torch import Tensor, nn

from training.batches import pad
from training.columns import MULTI_LABEL_SEPARATOR
from training.config import TrainConfig
from training.data import Split
from training.model import Classifier

Floats = NDArray[np.float32]
Choices = NDArray[np.int64]
# Regularisation strengths the baseline tries; the validation rows choose.
BASELINE_C = (1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Predictions:
    """`logits` and `probabilities` (N, K) float32 in the rows' order, and the mean loss over them."""

    logits: Floats
    probabilities: Floats
    loss: float


def loss_function(config: TrainConfig) -> nn.Module:
    """Mean over rows; takes logits (B, K) and targets (B, K). The guide's is binary cross-entropy on every column."""
    return nn.BCEWithLogitsLoss() if config.loss == "bce" else nn.CrossEntropyLoss()


def to_probabilities(logits: Tensor, task: str, temperature: float = 1.0) -> Tensor:
    """Logits (B, K) -> probabilities (B, K). Of a single label they sum to 1, whichever loss trained them."""
    scaled = logits.float() / temperature
    return scaled.softmax(dim=1) if task == "single_label" else scaled.sigmoid()


def choose(probabilities: Floats, task: str) -> Choices:
    """(N, K) zeros and ones: the likeliest label, or every label at 0.5 and above where a row may have several."""
    if task == "multi_label":
        return (probabilities >= 0.5).astype(np.int64)
    chosen = np.zeros(probabilities.shape, dtype=np.int64)
    chosen[np.arange(len(probabilities)), probabilities.argmax(axis=1)] = 1
    return chosen


@torch.inference_mode()
def predict(
    model: Classifier,
    rows: Sequence[Sequence[int]],
    targets: Floats,
    config: TrainConfig,
    batch_size: int,
    pad_id: int,
    device: torch.device,
    between_batches: Callable[[], None] = lambda: None,
) -> Predictions:
    """Predict token-id rows, longest together so that little is padded; results come back in the rows' order."""
    model.eval()
    loss_of = loss_function(config)
    gathered = torch.zeros(targets.shape)
    loss = 0.0
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        ids, mask = pad([rows[i] for i in index], pad_id)
        logits = model(ids.to(device), mask.to(device)).float()
        loss += float(loss_of(logits, torch.from_numpy(targets[index]).to(device))) * len(index)
        gathered[index] = logits.cpu()
        between_batches()
    probabilities = to_probabilities(gathered, config.task).numpy()
    return Predictions(gathered.numpy(), probabilities, loss / len(rows))


def metrics(targets: Floats, probabilities: Floats, labels: list[str], task: str) -> dict[tuple[str, str], float]:
    """Figures by (metric, label), the label empty for the whole split.

    Of a single label micro-F1 equals accuracy, by definition; both are given because both are asked for.
    """
    truth, chosen = targets.astype(np.int64), choose(probabilities, task)
    figures = {
        ("accuracy", ""): float(accuracy_score(truth, chosen)),
        ("f1_micro", ""): float(f1_score(truth, chosen, average="micro", zero_division=0)),
        ("f1_macro", ""): float(f1_score(truth, chosen, average="macro", zero_division=0)),
    }
    per_label = precision_recall_fscore_support(truth, chosen, average=None, zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), per_label, strict=True):
        figures |= {(name, label): float(value) for label, value in zip(labels, values, strict=True)}
    return figures


def confusion(targets: Floats, probabilities: Floats, labels: list[str]) -> dict[tuple[str, str], int]:
    """Counts by (actual, predicted) for single labels, every pair of labels, zeros included."""
    table = confusion_matrix(targets.argmax(1), probabilities.argmax(1), labels=range(len(labels)))
    return {
        (actual, predicted): int(table[i, j]) for i, actual in enumerate(labels) for j, predicted in enumerate(labels)
    }


def label_text(chosen: NDArray[np.int64], labels: list[str]) -> str:
    """A row's label as it is stored: the name, or names joined by `|`, empty when a row has none."""
    return MULTI_LABEL_SEPARATOR.join(label for label, taken in zip(labels, chosen, strict=True) if taken)


def certainty(probabilities: Floats, chosen: Choices, task: str) -> Floats:
    """(N,) how sure a prediction is: the chosen label's probability, or that of the least sure yes or no of a row."""
    if task == "multi_label":
        decided: Floats = np.where(chosen == 1, probabilities, 1 - probabilities)
        return np.asarray(decided.min(axis=1))
    return np.asarray(probabilities.max(axis=1))


def tfidf_baseline(train: Split, valid: Split, test: Split, task: str) -> Floats:
    """Test probabilities (N, K) of TF-IDF over characters (1 to 4) with logistic regression, C by validation macro-F1.

    What a model of a few seconds reaches on the same rows: a fine-tuned one should stand above it.
    """
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True)
    x_train = vectorizer.fit_transform(train.texts)
    x_valid, x_test = vectorizer.transform(valid.texts), vectorizer.transform(test.texts)
    best: tuple[float, Floats] | None = None
    for strength in BASELINE_C:
        model: Any = LogisticRegression(C=strength, max_iter=1000)
        if task == "multi_label":
            model = OneVsRestClassifier(model)
        model.fit(x_train, train.targets if task == "multi_label" else train.targets.argmax(axis=1))
        scored = np.asarray(model.predict_proba(x_valid), dtype=np.float32)
        quality = float(f1_score(valid.targets, choose(scored, task), average="macro", zero_division=0))
        if best is None or quality > best[0]:
            best = (quality, np.asarray(model.predict_proba(x_test), dtype=np.float32))
    assert best is not None  # noqa: S101 - BASELINE_C is not empty
    return best[1]
