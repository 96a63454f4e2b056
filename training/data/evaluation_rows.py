"""Labelled rows for the evaluation of a model that exists: the same checks as for training, and no split."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from db.errors import listed
from training.config import TrainConfig
from training.data.dataset import Rows, Split, find_duplicates
from training.data.numbers import TargetScale
from training.data.targets import labels_of_row, target_array
from training.errors import BadConfig, BadDataset
from training.text.cleaning import clean


@dataclass(frozen=True)
class EvaluationRows:
    """The rows to score, and counts of the rows that were read, left out and kept, and of each label."""

    rows: Split
    report: dict[str, Any]


def label_map(labels: list[str], config: TrainConfig, names: dict[str, str] | None) -> dict[str, str]:
    """Return label in the file -> label of the model: the model's labels, those it was trained with, then `names`.

    Raises `BadConfig` when `names` maps to a label that the model does not have.
    """
    if unknown := [name for name in (names or {}).values() if name not in labels]:
        raise BadConfig(f"--labels maps to {listed(unknown)}; the model's labels are {listed(labels)}")
    return {label: label for label in labels} | (config.labels or {}) | (names or {})


def evaluation_rows(
    rows: Rows,
    labels: list[str],
    config: TrainConfig,
    names: dict[str, str] | None = None,
    scale: TargetScale | None = None,
) -> EvaluationRows:
    """Clean the rows and leave out blank texts, copies, and texts with different labels.

    `labels` are the model's, in the order of its outputs, and `config` is the one it was trained with. `names` maps
    labels of the file to labels of the model. `scale` is that of a continuous model, whose targets are numbers. Raises
    `BadDataset` for a label that the model does not have, and when no row is left.
    """
    mapped = config
    if scale is None:
        mapped = config.model_copy(update={"labels": label_map(labels, config, names)})
    elif names:
        raise BadConfig("--labels names labels, and the model predicts numbers; leave it out")
    row_labels = [labels_of_row(*pair, mapped) for pair in zip(rows.labels, rows.row_numbers, strict=True)]
    table = find_duplicates(rows, row_labels)
    kept = table[~table[["blank", "again", "clashes"]].any(axis=1)]
    if not len(kept):
        raise BadDataset(
            f"none of the {len(table)} rows can be scored: the texts are blank or have different labels; add rows"
        )
    wanted = target_array([row_labels[i] for i in kept.index], labels, config)
    counts = {} if scale else {label: int(wanted[:, k].sum()) for k, label in enumerate(labels)}
    targets = wanted.astype(np.float32) if scale is None else scale.outputs(wanted)
    clashing = table[table["clashes"] & ~table["again"]]
    report = {
        "encoding": rows.encoding,
        "read": len(table),
        "blank": int(table["blank"].sum()),
        "duplicates": int(table["again"].sum()),
        "conflicting": len(clashing),
        "conflicting_rows": clashing["row_number"].head(10).tolist(),
        "rows": len(kept),
        "labels": counts,
    }
    texts = [clean(rows.texts[i], config.cleaner) for i in kept.index]
    return EvaluationRows(Split(texts, targets, kept["row_number"].tolist()), report)
