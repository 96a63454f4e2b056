"""Read labelled rows, remove duplicates, and split them into training, validation and test rows.

Columns are found by name, or in the guide's form: a header row, then an integer label and a text. A text, its retweets
and its copies count as one row, so that they cannot be in two splits; only the guide's split keeps every row. Token ids
and tensors are made elsewhere.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from db.errors import listed, plain, shown
from training.config import TrainConfig
from training.data.columns import (
    INTEGER,
    LABEL_COLUMNS,
    MULTI_LABEL_SEPARATOR,
    TEXT_COLUMNS,
    find_column,
    has_surrogates,
)
from training.data.numbers import TargetScale
from training.data.splits import (
    MIN_ROWS_OF_LABEL,
    Positions,
    check_folds,
    few_rows_note,
    few_rows_split,
    has_few_rows,
    rows_needed,
)
from training.data.table_file import TableFile, open_table
from training.data.targets import labels_of_row, output_labels, target_array
from training.errors import BadDataset, BadRow, BadSource
from training.store.paths import inside_roots, is_file
from training.text.cleaning import clean, same_text_key

if TYPE_CHECKING:
    import pandas as pd

MAX_TEXT_CHARS = 100_000
MAX_LABEL_CHARS = 1_000
PART_NAMES = {"train": "training", "valid": "validation", "test": "test"}
NEEDED = "a dataset needs a header and a label and a text in each row"


@dataclass(frozen=True)
class Rows:
    """Texts and labels as written in the file, and the line, from 1, at which each row begins."""

    texts: list[str]
    labels: list[str]
    row_numbers: list[int]
    encoding: str = "UTF-8"


@dataclass(frozen=True)
class Split:
    """Cleaned texts, `targets` (N, K) float32, the row numbers in the file, and the rows' weights (N,) in the loss.

    Targets of labelled rows are zeros and ones; others may be probabilities. Those of a continuous task are (N, 1), in
    the units of the model's outputs, see `TargetScale`. Without `weights` every row counts as 1. `keys` are those of
    the texts before cleaning, see `same_text_key`; rows that are not in the file have none.
    """

    texts: list[str]
    targets: NDArray[np.float32]
    row_numbers: list[int]
    weights: NDArray[np.float32] | None = None
    keys: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)


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


@dataclass(frozen=True)
class Dataset:
    """The rows of each part. `scale` is None unless the task is continuous."""

    labels: list[str]
    train: Split
    valid: Split
    test: Split
    report: dict[str, Any] = field(default_factory=dict)
    scale: TargetScale | None = None


def find_dataset(name: str, roots: Sequence[Path]) -> Path:
    """The path of a dataset whose name comes from a client; raises `BadDataset` when it is outside `roots`."""
    path = inside_roots(name, roots)
    if path is None:
        raise BadDataset(
            f"dataset {shown(name)} lies outside the folders this worker may read ({listed(roots)}); submit it "
            "with `tweetscore train`, or add its folder to TWEETSCORE_READ_ROOTS"
        )
    _check_exists(path)
    return path


def read_rows(path: Path) -> Rows:
    """Read the labelled rows of a file. Raises `BadDataset` with the row and the remedy."""
    _check_exists(path)
    try:
        with open_table(path, default_format="csv") as table:
            return _read_table(table)
    except BadSource as error:
        raise BadDataset(f"{error}; {NEEDED}") from error


def split_rows(rows: Rows, config: TrainConfig) -> Dataset:
    """Clean and deduplicate the rows, map their labels, and split them into training, validation and test rows.

    The guide's shares are 8 : 1 : 1. Rows of one label are stratified; when a label has few rows, each part still gets
    rows of each label, and the report has a note. The same rows and seed give the same split. With `split: guide` the
    parts are those that the guide's code draws, in its order and with duplicates. Raises `BadDataset` when a label is
    unknown, there is only one, or a label has fewer rows than the split or `folds` needs, and for a continuous task
    when a label is not a number or all are equal.
    """
    row_labels = [
        labels_of_row(label, number, config) for label, number in zip(rows.labels, rows.row_numbers, strict=True)
    ]
    table = find_duplicates(rows, row_labels)
    kept = table if config.split == "guide" else table[~table[["blank", "again", "clashes"]].any(axis=1)]
    names = output_labels([row_labels[i] for i in kept.index], config)
    _check_enough(rows, row_labels, kept.index.tolist(), names, config)

    targets = target_array([row_labels[i] for i in kept.index], names, config)
    positions = (guide_split if config.split == "guide" else stratified_split)(targets, config)
    scale = None
    if config.task == "continuous":
        scale = TargetScale.fitted(targets[positions["train"]], config.polarity)
        targets = scale.outputs(targets).astype(np.float64)
    splits = {
        part: Split(
            [clean(rows.texts[i], config.cleaner) for i in kept.index[index]],
            targets[index].astype(np.float32),
            kept["row_number"].iloc[index].tolist(),
            keys=kept["key"].iloc[index].tolist(),
        )
        for part, index in positions.items()
    }
    report = _report(rows, table, kept, positions, config)
    if scale is None:
        report["labels"] = {
            name: {part: int(split.targets[:, k].sum()) for part, split in splits.items()}
            for k, name in enumerate(names)
        }
    if config.split == "guide":
        _check_parts(report, splits, config)
    elif config.one_label and (note := few_rows_note(report["labels"], config)):
        report["notes"] = [note]
    return Dataset(names, splits["train"], splits["valid"], splits["test"], report, scale)


def stratified_split(targets: NDArray[np.floating[Any]], config: TrainConfig) -> Positions:
    """Split rows by `targets` (N, K); rows of one label are stratified."""
    if has_few_rows(targets, config):
        return few_rows_split(targets, config)
    # Imported here because scoring workers also import this module, and start faster without scikit-learn.
    from sklearn.model_selection import train_test_split

    stratify = targets.argmax(axis=1) if config.one_label else None
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


def guide_split(targets: NDArray[np.floating[Any]], config: TrainConfig) -> Positions:
    """Split rows with the guide's code. It ignores labels, so a part may have no row of a label."""
    import pandas as pd

    new_df = pd.DataFrame({"row": np.arange(len(targets))})
    sample_df = new_df.sample(frac=1, random_state=config.seed)
    train_dataset = sample_df.sample(frac=config.train_size, random_state=config.seed)
    test_df = sample_df.drop(train_dataset.index).reset_index(drop=True)
    valid_dataset = test_df.sample(frac=config.valid_size, random_state=config.seed)
    test_dataset = test_df.drop(valid_dataset.index)
    parts = {"train": train_dataset, "valid": valid_dataset, "test": test_dataset}
    return {part: drawn["row"].to_numpy() for part, drawn in parts.items()}


def _check_exists(path: Path) -> None:
    if not is_file(path):
        raise BadDataset(
            f"there is no file {plain(path)}; name a CSV, TSV, JSONL or Parquet file with labels and texts"
        )


def _read_table(table: TableFile) -> Rows:
    rows = Rows([], [], [], table.encoding_name)
    # Text and label column by a row's columns: objects in JSON lines do not all have the same keys.
    chosen: dict[tuple[str, ...], tuple[str | None, str | None]] = {}
    guide_form = False
    for number, values in table.rows(strict=True):
        if isinstance(values, BadRow):
            raise BadDataset(f"row {number} of {table.name}: {values}")
        if not isinstance(values, dict):
            raise BadDataset(
                f'row {number} of {table.name} is not a JSON object; write one a line: {{"label": …, "text": …}}'
            )
        columns = tuple(values)
        if columns not in chosen:
            chosen[columns] = find_column(columns, TEXT_COLUMNS), find_column(columns, LABEL_COLUMNS)
            # Without these names, the guide's form: an integer label comes first and a text second.
            if table.header and len(columns) > 1 and None in chosen[columns]:
                chosen[columns], guide_form = (columns[1], columns[0]), True
        text, label = (_cell(values.get(column)) if column else "" for column in chosen[columns])
        if guide_form and not INTEGER.fullmatch(label.strip()):
            raise _columns_missing(table, columns)
        _check_text(text, number, table)
        _check_label(label, number, table)
        rows.texts.append(text)
        rows.labels.append(label.strip())
        rows.row_numbers.append(number)
    if not rows.texts:
        raise BadDataset(f"{table.name} {'holds no rows' if table.header else 'is empty'}; {NEEDED}")
    if not all(any(pair) for pair in zip(*chosen.values(), strict=True)):
        raise _columns_missing(table, dict.fromkeys(chain(*chosen)))
    return rows


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return MULTI_LABEL_SEPARATOR.join(map(str, value))
    return "" if value is None else str(value)


def _columns_missing(table: TableFile, columns: Iterable[str]) -> BadDataset:
    return BadDataset(
        f"{table.name} has the columns {listed(columns)}; name one of them {'/'.join(LABEL_COLUMNS)} and one "
        f"{'/'.join(TEXT_COLUMNS)}, or put an integer label first and the text second"
    )


def _check_text(text: str, number: int, table: TableFile) -> None:
    if len(text) > MAX_TEXT_CHARS:
        raise BadDataset(
            f"the text in row {number} of {table.name} has {len(text):,} characters; a tweet has at most "
            f"{MAX_TEXT_CHARS:,}: shorten or remove it"
        )
    if not _storable(text):
        raise BadDataset(
            f"the text in row {number} of {table.name} contains a NUL or half a surrogate pair, which no database "
            "stores; remove the character"
        )


def _check_label(label: str, number: int, table: TableFile) -> None:
    if len(label) > MAX_LABEL_CHARS or not _storable(label):
        raise BadDataset(
            f"the label {shown(label)} in row {number} of {table.name} is longer than {MAX_LABEL_CHARS:,} "
            "characters, or contains a NUL or half a surrogate pair, which no database stores; correct it"
        )


def _storable(text: str) -> bool:
    return "\x00" not in text and not has_surrogates(text)


def find_duplicates(rows: Rows, row_labels: Sequence[tuple[str, ...]]) -> "pd.DataFrame":
    """For each row, the key of its text, and whether the text is blank, repeats an earlier row, or also has other
    labels."""
    # Imported here because scoring workers also import this module, and start faster without pandas.
    import pandas as pd

    keys = pd.Series([same_text_key(text) for text in rows.texts], dtype="object")
    labels = pd.Series(["\x00".join(sorted(names)) for names in row_labels], dtype="object")
    blank = keys == ""
    return pd.DataFrame(
        {
            "key": keys,
            "row_number": rows.row_numbers,
            "blank": blank,
            "again": keys.duplicated() & ~blank,
            "clashes": (labels.groupby(keys).transform("nunique") > 1) & ~blank,
        }
    )


def _report(
    rows: Rows, table: "pd.DataFrame", kept: "pd.DataFrame", positions: Positions, config: TrainConfig
) -> dict[str, Any]:
    """Counts of rows read, left out and kept; for the guide's split also of test texts also in the training rows."""
    clashing = table[table["clashes"] & ~table["again"]]
    report: dict[str, Any] = {
        "split": config.split,
        "encoding": rows.encoding,
        "read": len(table),
        "blank": int(table["blank"].sum()),
        "duplicates": int(table["again"].sum()),
        "conflicting": len(clashing),
        "conflicting_rows": clashing["row_number"].head(10).tolist(),
        "rows": len(kept),
        "sizes": {part: len(index) for part, index in positions.items()},
    }
    if config.split == "guide":
        keys = {part: kept["key"].iloc[index] for part, index in positions.items()}
        report["also_in_training"] = {part: int(keys[part].isin(keys["train"]).sum()) for part in ("valid", "test")}
    return report


def _check_enough(
    rows: Rows, row_labels: Sequence[tuple[str, ...]], kept: list[int], names: list[str], config: TrainConfig
) -> None:
    needed = 1 if config.split == "guide" else rows_needed(config)
    if config.one_label:
        needed = min(needed, MIN_ROWS_OF_LABEL)
    if len(kept) < needed:
        raise BadDataset(
            f"the dataset has {len(kept)} distinct texts that are not blank in {len(rows.texts)} rows; a split into "
            f"training, validation and test rows needs at least {needed}"
        )
    if config.task == "continuous":
        return
    if len(names) < 2:
        raise BadDataset(f"every row has the label {listed(names) or '(none)'}; a classifier needs at least two labels")
    counts = Counter(name for i in kept for name in row_labels[i])
    for name in names:
        if config.one_label and counts[name] < needed:
            where = next((rows.row_numbers[i] for i in kept if name in row_labels[i]), None)
            raise BadDataset(
                f"label {shown(name)} has {counts[name]} distinct texts{f' (first in row {where})' if where else ''}; "
                f"a split needs at least {needed} of each label: add rows, or name the labels you mean in --labels"
                + (", or predict the number itself with --task continuous" if config.task == "ordinal" else "")
            )
    check_folds(len(kept), counts, config)


def _check_parts(report: dict[str, Any], splits: dict[str, Split], config: TrainConfig) -> None:
    """The guide's split ignores labels, so check that each part has rows, and rows of each label."""
    remedy = "add rows, try another seed, or leave out `--split guide`"
    for part, split in splits.items():
        if not len(split):
            raise BadDataset(f"the guide's split of {report['rows']} rows has no {PART_NAMES[part]} rows; {remedy}")
        for label, found in report.get("labels", {}).items():
            if config.one_label and not found[part]:
                raise BadDataset(
                    f"the guide's split has none of the {sum(found.values())} rows of label {shown(label)} among its "
                    f"{len(split)} {PART_NAMES[part]} rows; {remedy}"
                )
    if not any(map(same_text_key, splits["train"].texts)):
        raise BadDataset(f"every training row is blank; {NEEDED}")
