"""The sample tweets that come with tweetscore, and how they help to train on few labels of one's own."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from training.config import TrainConfig
from training.data.columns import sentiment_of
from training.data.dataset import Dataset, Split, read_rows
from training.text.cleaning import clean, same_text_key

LABELLED = Path(__file__).parents[1] / "sample" / "labelled.csv"
UNLABELLED = LABELLED.with_name("unlabelled.jsonl")
# With more rows of one's own, the sample adds time and no accuracy.
OWN_ROWS_AT_MOST = 2_000


def with_sample(data: Dataset, config: TrainConfig) -> Dataset:
    """Add the sample's rows to the training rows where they help; else return `data` as it is.

    They help when `add_sample` is set, every label names a sentiment, positive and negative among them, and the dataset
    has at most `OWN_ROWS_AT_MOST` training rows. A text that the dataset has in any part is not added. The rows have no
    number in the file, so theirs is 0, and they count `sample_weight` times as much in the loss as the dataset's.
    """
    column = {sentiment_of(label): index for index, label in enumerate(data.labels)}
    fits = config.task == "single_label" and None not in column and {"positive", "negative"} <= set(column)
    if not config.add_sample or not fits or len(column) < len(data.labels) or len(data.train) > OWN_ROWS_AT_MOST:
        return data
    rows = read_rows(LABELLED)
    known = {same_text_key(text) for part in (data.train, data.valid, data.test) for text in part.texts}
    chosen = [
        i
        for i, (text, label) in enumerate(zip(rows.texts, rows.labels, strict=True))
        if label in column and same_text_key(text) not in known
    ]
    if not chosen:
        return data
    targets = np.zeros((len(chosen), len(data.labels)), np.float32)
    targets[np.arange(len(chosen)), [column[rows.labels[i]] for i in chosen]] = 1
    weights = np.concatenate(
        [np.ones(len(data.train), np.float32), np.full(len(chosen), config.sample_weight, np.float32)]
    )
    train = Split(
        data.train.texts + [clean(rows.texts[i], config.cleaner) for i in chosen],
        np.concatenate([data.train.targets, targets]),
        data.train.row_numbers + [0] * len(chosen),
        weights,
    )
    return replace(data, train=train, report={**data.report, "sample_rows": len(chosen)})
