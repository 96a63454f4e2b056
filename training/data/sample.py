"""The sample tweets that come with tweetscore, and how they help to train on few labels of one's own."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.config import TrainConfig
from training.data.columns import SENTIMENTS, sentiment_of
from training.data.dataset import Dataset, Split, read_rows
from training.text.cleaning import clean, same_text_key

LABELLED = Path(__file__).parents[1] / "sample" / "labelled.csv"
UNLABELLED = LABELLED.with_name("unlabelled.jsonl")
# With more rows of one's own, the sample adds time and no accuracy.
OWN_ROWS_AT_MOST = 2_000


def with_sample(data: Dataset, config: TrainConfig) -> Dataset:
    """Add the sample's rows to the training rows where they help (see `sample_rows`); else return `data` as it is."""
    keys = [key for part in (data.train, data.valid, data.test) for key in part.keys]
    rows = sample_rows(data.labels, keys, len(data.train), config)
    if rows is None:
        return data
    note = f"{len(rows):,} tweets of tweetscore's sample were added to the training rows (`add_sample`)"
    report = {**data.report, "sample_rows": len(rows), "notes": [*data.report.get("notes", ()), note]}
    return replace(data, train=joined(data.train, rows), report=report)


def sample_rows(
    labels: Sequence[str], own_keys: Collection[str], training_rows: int, config: TrainConfig
) -> Split | None:
    """Return the sample's rows for a dataset, or None where they do not help.

    They help when `add_sample` is set, the labels are positive, neutral and negative by a usual name, and the dataset
    has at most `OWN_ROWS_AT_MOST` training rows. A text whose key (`same_text_key`) is among `own_keys` is left out.
    The rows have no number in the file, so theirs is 0, and they count `sample_weight` times as much in the loss as the
    rows of the dataset.
    """
    column = {sentiment_of(label): index for index, label in enumerate(labels)}
    fits = config.task == "single_label" and len(labels) == len(column) and set(column) == set(SENTIMENTS)
    if not config.add_sample or not fits or training_rows > OWN_ROWS_AT_MOST:
        return None
    rows = read_rows(LABELLED)
    known = set(own_keys)
    chosen = [i for i, text in enumerate(rows.texts) if same_text_key(text) not in known]
    if not chosen:
        return None
    targets = np.zeros((len(chosen), len(labels)), np.float32)
    targets[np.arange(len(chosen)), [column[rows.labels[i]] for i in chosen]] = 1
    texts = [clean(rows.texts[i], config.cleaner) for i in chosen]
    return Split(texts, targets, [0] * len(chosen), np.full(len(chosen), config.sample_weight, np.float32))


def joined(first: Split, second: Split) -> Split:
    """Return the rows of both, in order."""
    weights = None
    if first.weights is not None or second.weights is not None:
        weights = np.concatenate([_weights(first), _weights(second)])
    return Split(
        first.texts + second.texts,
        np.concatenate([first.targets, second.targets]),
        first.row_numbers + second.row_numbers,
        weights,
        first.keys + second.keys,
    )


def _weights(split: Split) -> NDArray[np.float32]:
    return np.ones(len(split), np.float32) if split.weights is None else split.weights
