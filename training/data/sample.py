"""The sample tweets that come with tweetscore, for a model that has few labels of its own to learn from."""

from pathlib import Path

import numpy as np

from training.config import TrainConfig
from training.data.columns import SENTIMENTS, sentiment_of
from training.data.dataset import Dataset, Split, read_rows
from training.text.cleaning import clean, same_text_key

LABELLED = Path(__file__).parents[1] / "sample" / "labelled.csv"
UNLABELLED = LABELLED.with_name("unlabelled.jsonl")
# With more rows of one's own, the sample adds time and no accuracy.
OWN_ROWS_AT_MOST = 2_000
# One of so many tweets is not trained on.
HELD_OUT_PART = 20


def sample_for(data: Dataset, config: TrainConfig) -> tuple[Split, Split] | None:
    """Return the sample's rows to train and to validate on before `data`, or None where they do not help.

    They help when `add_sample` is set, the labels are positive, neutral and negative by a usual name, and the dataset
    has at most `OWN_ROWS_AT_MOST` training rows. The targets are in the order of the dataset's labels. A text of the
    dataset is left out: it may be among the test rows.
    """
    column = {sentiment_of(label): index for index, label in enumerate(data.labels)}
    fits = config.task == "single_label" and len(data.labels) == len(column) and set(column) == set(SENTIMENTS)
    if not config.add_sample or not fits or len(data.train) > OWN_ROWS_AT_MOST:
        return None
    rows = read_rows(LABELLED)
    own = {key for part in (data.train, data.valid, data.test) for key in part.keys}
    chosen = [i for i, text in enumerate(rows.texts) if same_text_key(text) not in own]
    held_out = chosen[::HELD_OUT_PART]

    def take(index: list[int]) -> Split:
        targets = np.zeros((len(index), len(data.labels)), np.float32)
        targets[np.arange(len(index)), [column[rows.labels[i]] for i in index]] = 1
        return Split([clean(rows.texts[i], config.cleaner) for i in index], targets, [0] * len(index))

    train = take(sorted(set(chosen) - set(held_out)))
    return (train, take(held_out)) if len(train) else None
