"""Splits besides the ordinary one: of labels with few rows, and the folds of a cross-validation.

They work on targets (N, K) and return the positions of the rows of each part.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from db.errors import listed, shown
from training.config import TrainConfig
from training.errors import BadDataset

Positions = dict[str, NDArray[np.intp]]  # of the rows of each part (train, valid, test), in order

# Two training rows, a validation row and a test row.
MIN_ROWS_OF_LABEL = 4
USUAL_FOLDS = 5


def rows_needed(config: TrainConfig) -> int:
    """Return the number of rows of which every part gets its share. With the default shares it is 10."""
    rest = 1 - config.train_size
    smallest_share = min(config.train_size, rest * config.valid_size, rest * (1 - config.valid_size))
    return ceil(round(1 / smallest_share, 6))


def has_few_rows(targets: NDArray[np.floating[Any]], config: TrainConfig) -> bool:
    """Return whether a label has too few rows for the ordinary stratified split."""
    return config.one_label and targets.sum(axis=0).min() < rows_needed(config)


def few_rows_split(targets: NDArray[np.floating[Any]], config: TrainConfig) -> Positions:
    """Split the rows of each label by themselves: each part gets a row of every label, and training at least two.

    Every label needs `MIN_ROWS_OF_LABEL` rows. The same rows and seed give the same split.
    """
    generator = np.random.default_rng(config.seed)
    parts: dict[str, list[NDArray[np.intp]]] = {"train": [], "valid": [], "test": []}
    for column in targets.T:
        rows = generator.permutation(np.flatnonzero(column))
        share = 1 - config.train_size
        valid = max(1, round(len(rows) * share * config.valid_size))
        test = max(1, round(len(rows) * share * (1 - config.valid_size)))
        while len(rows) - valid - test < 2:
            valid, test = (valid - 1, test) if valid > test else (valid, test - 1)
        for part, taken in zip(parts, np.split(rows, [len(rows) - valid - test, len(rows) - test]), strict=True):
            parts[part].append(taken)
    return {part: generator.permutation(np.concatenate(taken)) for part, taken in parts.items()}


def few_rows_note(labels: Mapping[str, Mapping[str, int]], config: TrainConfig) -> str | None:
    """Return a sentence on labels with few rows; `labels` are the rows of each label in each part of the split.

    None when no label has few.
    """
    rows = {name: sum(parts.values()) for name, parts in labels.items()}
    few = [name for name in labels if rows[name] < rows_needed(config)]
    if not few:
        return None
    counts = listed(f"{name} {rows[name]} ({labels[name]['test']} in the test part)" for name in few)
    remedy = "label more rows, or train with --folds "
    remedy += f"{min(USUAL_FOLDS, *rows.values())}, which measures on every row"
    if config.folds is not None:
        remedy = "go by the cross-validation, and label more rows"
    return f"few rows: {counts}; the test figures of these labels and macro-F1 say next to nothing: {remedy}"


def check_folds(rows: int, counts: Mapping[str, int], config: TrainConfig) -> None:
    """Raise `BadDataset` when there are fewer rows, or rows of a single label in `counts`, than folds."""
    if config.folds is None:
        return
    if not config.one_label:
        if rows < config.folds:
            raise BadDataset(
                f"the dataset has {rows} distinct texts, and {config.folds} folds need one each; use --folds {rows}"
            )
        return
    rarest = min(counts, key=lambda name: counts[name])
    if counts[rarest] < config.folds:
        raise BadDataset(
            f"label {shown(rarest)} has {counts[rarest]} distinct texts, and {config.folds} folds need one each; "
            f"add rows, or use --folds {counts[rarest]}"
        )


def fold_splits(targets: NDArray[np.floating[Any]], config: TrainConfig) -> Sequence[Positions]:
    """Return a split for each fold. Its `test` rows are held out: each row is in those of exactly one fold.

    Folds and validation rows are stratified for single labels. The validation rows have the same share of the rows that
    are not held out as in the ordinary split. The same rows and seed give the same folds.
    """
    # Imported here because scoring workers also import this module, and start faster without scikit-learn.
    from sklearn.model_selection import KFold, StratifiedKFold

    stratified = config.one_label
    labels = targets.argmax(axis=1) if stratified else np.zeros(len(targets), np.intp)
    folds = (StratifiedKFold if stratified else KFold)(config.folds, shuffle=True, random_state=config.seed)
    of_all = (1 - config.train_size) * config.valid_size
    share = of_all / (config.train_size + of_all)
    splits = []
    for number, (others, held_out) in enumerate(folds.split(targets, labels)):
        generator = np.random.default_rng((config.seed, number))
        train, valid = [], []
        for label in np.unique(labels[others]):
            rows = generator.permutation(others[labels[others] == label])
            taken = min(max(1, round(len(rows) * share)), len(rows) - 1)
            valid.append(rows[:taken])
            train.append(rows[taken:])
        splits.append(
            {
                "train": generator.permutation(np.concatenate(train)),
                "valid": generator.permutation(np.concatenate(valid)),
                "test": held_out,
            }
        )
    return splits
