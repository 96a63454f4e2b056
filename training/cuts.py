"""Which rows go into which part: row positions of the training, validation and test rows, in order. Knows no texts."""

import numpy as np
from numpy.typing import NDArray

from training.config import TrainConfig

Cut = dict[str, NDArray[np.intp]]  # by part: train, valid, test


def stratified_cut(targets: NDArray[np.float32], config: TrainConfig) -> Cut:
    """By `targets` (N, K), of which single labels are stratified."""
    # Here, as a scorer loads this module too, and starts sooner without scikit-learn.
    from sklearn.model_selection import train_test_split

    stratify = targets.argmax(axis=1) if config.task == "single_label" else None
    train, rest = train_test_split(
        np.arange(len(targets)), train_size=config.train_size, random_state=config.seed, stratify=stratify
    )
    valid, test = train_test_split(
        rest,
        train_size=config.valid_size,
        random_state=config.seed,
        stratify=None if stratify is None else stratify[rest],
    )
    return {"train": train, "valid": valid, "test": test}


def guide_cut(targets: NDArray[np.float32], config: TrainConfig) -> Cut:
    """The rows that the guide draws, by its own lines. They look at no label, and may leave a part without one."""
    import pandas as pd

    new_df = pd.DataFrame({"row": np.arange(len(targets))})
    sample_df = new_df.sample(frac=1, random_state=config.seed)
    train_dataset = sample_df.sample(frac=config.train_size, random_state=config.seed)
    test_df = sample_df.drop(train_dataset.index).reset_index(drop=True)
    valid_dataset = test_df.sample(frac=config.valid_size, random_state=config.seed)
    test_dataset = test_df.drop(valid_dataset.index)
    parts = {"train": train_dataset, "valid": valid_dataset, "test": test_dataset}
    return {part: drawn["row"].to_numpy() for part, drawn in parts.items()}


CUTS = {"stratified": stratified_cut, "guide": guide_cut}
