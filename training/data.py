"""Labelled rows -> deduplicated, stratified, seeded splits. Knows no tokens and no tensors beyond the targets.

The guide's form works as it is (a header row, then an integer label and a text); so do named columns, in CSV, TSV and
JSONL. A text, its retweets and its copies are one row: they can never stand in two splits, unless the guide's own split
is asked for, which takes every row.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from db.errors import listed, plain, shown
from training.clean import clean, same_text_key
from training.columns import LABEL_COLUMNS, MULTI_LABEL_SEPARATOR, TEXT_COLUMNS
from training.config import TrainConfig
from training.cuts import CUTS, Cut
from training.errors import BadDataset, BadSource
from training.paths import inside_roots, is_file
from training.sources import Source, has_bad_bytes, open_source

if TYPE_CHECKING:
    import pandas as pd

MAX_TEXT_CHARS = 100_000
MAX_LABEL_CHARS = 1_000
NAMES = {"train": "training", "valid": "validation", "test": "test"}
INTEGER = re.compile(r"-?[0-9]+")


@dataclass(frozen=True)
class Rows:
    """Texts as they came, raw labels as they were written, and the line of the file, from 1, that each begins at."""

    texts: list[str]
    labels: list[str]
    row_numbers: list[int]
    encoding: str = "UTF-8"


@dataclass(frozen=True)
class Split:
    """Cleaned texts, `targets` (N, K) float32 of zeros and ones, and the row numbers they had in the file."""

    texts: list[str]
    targets: NDArray[np.float32]
    row_numbers: list[int]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Dataset:
    labels: list[str]
    train: Split
    valid: Split
    test: Split
    report: dict[str, Any] = field(default_factory=dict)


def find_dataset(name: str, roots: Sequence[Path]) -> Path:
    """The file behind a name that may come from anyone; raises `BadDataset` when it lies outside `roots`."""
    path = inside_roots(name, roots)
    if path is None:
        raise BadDataset(
            f"dataset {shown(name)} lies outside the folders this worker may read ({listed(roots)}); submit it "
            "with `tweetscore train`, or add its folder to TWEETSCORE_READ_ROOTS"
        )
    _check_there(path)
    return path


def read_rows(path: Path) -> Rows:
    """Labelled rows of a CSV, TSV, JSONL or Parquet file, gzipped or not.

    Raises `BadDataset` with the row and the remedy.
    """
    _check_there(path)
    try:
        with open_source(path, otherwise="csv") as source:
            header, table = TABLES[source.format](source, path)
            encoding = source.encoding_name
    except BadSource as error:
        raise BadDataset(f"{error}; a dataset needs a header and a label and a text in each row") from error
    if not table:
        empty = "is empty" if not header else "holds no rows"
        raise BadDataset(f"{plain(path.name)} {empty}; a dataset needs a header and a label and a text in each row")
    text_column, label_column = _find_columns(header, table, path)
    rows = Rows([], [], [], encoding)
    for number, values in table:
        text, label = values[text_column], values[label_column]
        if has_bad_bytes(text + label):
            raise BadDataset(
                f"row {number} of {plain(path.name)} is not {encoding}, or holds half a surrogate pair; mend it or "
                "convert the file to UTF-8 first"
            )
        _check_text(text, number, path)
        _check_label(label, number, path)
        rows.texts.append(text)
        rows.labels.append(label.strip())
        rows.row_numbers.append(number)
    return rows


def split_rows(rows: Rows, config: TrainConfig) -> Dataset:
    """Clean, deduplicate, name the labels, and cut into training, validation and test rows (8 : 1 : 1 by the guide).

    Single labels are stratified. The cut is the same for the same rows and seed. With `split: guide` the rows of each
    part are the guide's, in its order, copies and all. Raises `BadDataset` when a label is unknown, there is only one,
    or a label has fewer rows than the split needs.
    """
    named = [_name_labels(label, number, config) for label, number in zip(rows.labels, rows.row_numbers, strict=True)]
    table = _table(rows, named)
    kept = table if config.split == "guide" else table[~table[["blank", "again", "clashes"]].any(axis=1)]
    names = _label_names([named[i] for i in kept.index], config)
    _check_enough(rows, named, kept.index.tolist(), names, config)

    position = {name: index for index, name in enumerate(names)}
    targets = np.zeros((len(kept), len(names)), dtype=np.float32)
    for row, i in enumerate(kept.index):
        targets[row, [position[name] for name in named[i]]] = 1.0
    cut = CUTS[config.split](targets, config)
    splits = {
        part: Split(
            [clean(rows.texts[i], config.cleaner) for i in kept.index[index]],
            targets[index],
            kept["row_number"].iloc[index].tolist(),
        )
        for part, index in cut.items()
    }
    report = _report(rows, table, kept, cut, config)
    report["labels"] = {
        name: {part: int(split.targets[:, position[name]].sum()) for part, split in splits.items()} for name in names
    }
    if config.split == "guide":
        _check_parts(report, splits, config)
    return Dataset(names, splits["train"], splits["valid"], splits["test"], report)


def _check_there(path: Path) -> None:
    if not is_file(path):
        raise BadDataset(
            f"there is no file {plain(path)}; name a CSV, TSV, JSONL or Parquet file with labels and texts"
        )


Table = list[tuple[int, list[str]]]


def _read_csv(source: Source, path: Path) -> tuple[list[str], Table]:
    """The header, and every row with the line it begins at; blank lines are passed over."""
    table: Table = []
    csv.field_size_limit(10 * MAX_TEXT_CHARS)
    reader = csv.reader(source.text, delimiter="\t" if source.format == "tsv" else ",", strict=True)
    header: list[str] = []
    begins = 1
    try:
        for values in reader:
            if not header:
                header = values if any(value.strip() for value in values) else []
            elif values:
                if len(values) != len(header):
                    raise BadDataset(
                        f"row {begins} of {plain(path.name)} has {len(values)} columns and the header "
                        f"{len(header)}; put quotes around a text that holds a comma"
                    )
                table.append((begins, values))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise BadDataset(f"row {begins} of {plain(path.name)} cannot be read ({plain(error)}); mend it") from error
    return header, table


def _read_jsonl(source: Source, path: Path) -> tuple[list[str], Table]:
    """The keys of all objects, and every object's values by them; what an object lacks is empty."""
    objects: list[tuple[int, dict[str, Any]]] = []
    # Not splitlines: a JSON string may hold U+2028 and its like as they are.
    for number, line in enumerate(source.text.read().split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadDataset(f"line {number} of {plain(path.name)} is not JSON; mend it or take it out") from error
        if not isinstance(value, dict):
            raise BadDataset(f'line {number} of {plain(path.name)} is no JSON object; write {{"label": …, "text": …}}')
        objects.append((number, value))
    keys = list(dict.fromkeys(key for _, value in objects for key in value))
    return keys, [(number, [_json_cell(value.get(key)) for key in keys]) for number, value in objects]


def _read_parquet(source: Source, path: Path) -> tuple[list[str], Table]:
    try:
        read = pq.read_table(source.binary)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadDataset(f"{plain(path.name)} is no Parquet that can be read; write it again") from error
    rows = zip(*(column.to_pylist() for column in read.columns), strict=True)
    return read.column_names, [(number, [_json_cell(value) for value in row]) for number, row in enumerate(rows, 1)]


TABLES = {"csv": _read_csv, "tsv": _read_csv, "json": _read_jsonl, "parquet": _read_parquet}


def _json_cell(value: Any) -> str:
    if isinstance(value, list):
        return MULTI_LABEL_SEPARATOR.join(map(str, value))
    return "" if value is None else str(value)


def _check_text(text: str, number: int, path: Path) -> None:
    if len(text) > MAX_TEXT_CHARS:
        raise BadDataset(
            f"the text in row {number} of {plain(path.name)} has {len(text):,} characters; a tweet has at most "
            f"{MAX_TEXT_CHARS:,}: shorten it or take it out"
        )
    if not _storable(text):
        raise BadDataset(
            f"the text in row {number} of {plain(path.name)} holds a NUL or half a surrogate pair, which no database "
            "stores; take the character out"
        )


def _check_label(label: str, number: int, path: Path) -> None:
    if len(label) > MAX_LABEL_CHARS or not _storable(label):
        raise BadDataset(
            f"the label {shown(label)} in row {number} of {plain(path.name)} is longer than {MAX_LABEL_CHARS:,} "
            "characters, or holds a NUL or half a surrogate pair, which no database stores; mend it"
        )


def _storable(text: str) -> bool:
    return "\x00" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def _find_columns(header: list[str], table: Table, path: Path) -> tuple[int, int]:
    """Positions of the text and of the label."""
    by_name = {name.strip().lower(): position for position, name in enumerate(header)}
    text = next((by_name[name] for name in TEXT_COLUMNS if name in by_name), None)
    label = next((by_name[name] for name in LABEL_COLUMNS if name in by_name), None)
    if text is not None and label is not None:
        return text, label
    # The guide's positional form: whatever the header says, an integer label stands first and a text second.
    if len(header) >= 2 and all(INTEGER.fullmatch(values[0].strip()) for _, values in table):
        return 1, 0
    raise BadDataset(
        f"{plain(path.name)} has the columns {listed(header)}; name one of them {'/'.join(LABEL_COLUMNS)} and one "
        f"{'/'.join(TEXT_COLUMNS)}, or put an integer label first and the text second"
    )


def _name_labels(raw: str, number: int, config: TrainConfig) -> tuple[str, ...]:
    """The label names of one row, in order, each once."""
    parts = raw.split(MULTI_LABEL_SEPARATOR) if config.task == "multi_label" else [raw]
    names = []
    for part in (part.strip() for part in parts):
        if not part and config.task == "multi_label":
            continue  # a row without any label is an example of none of them
        if not part:
            raise BadDataset(f"row {number} has no label; fill it in or take the row out")
        if config.labels is not None and part not in config.labels:
            raise BadDataset(
                f"label {shown(part)} in row {number} is none of {listed(config.labels)}; "
                "fix the row or name it in --labels"
            )
        names.append(part if config.labels is None else config.labels[part])
    return tuple(dict.fromkeys(names))


def _table(rows: Rows, named: Sequence[tuple[str, ...]]) -> "pd.DataFrame":
    """A line a row: what tells its text from others, and whether it is blank, was there before, or clashes with a row
    of the same text under other labels."""
    # Here, as a scorer loads this module too, and starts sooner without pandas.
    import pandas as pd

    keys = pd.Series([same_text_key(text) for text in rows.texts], dtype="object")
    labels = pd.Series(["\x00".join(sorted(names)) for names in named], dtype="object")
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
    rows: Rows,
    table: "pd.DataFrame",
    kept: "pd.DataFrame",
    cut: Cut,
    config: TrainConfig,
) -> dict[str, Any]:
    """What became of the rows; of the guide's split also how many texts it tests on after training on them."""
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
        "sizes": {part: len(index) for part, index in cut.items()},
    }
    if config.split == "guide":
        keys = {part: kept["key"].iloc[index] for part, index in cut.items()}
        report["also_in_training"] = {part: int(keys[part].isin(keys["train"]).sum()) for part in ("valid", "test")}
    return report


def _label_names(named: Sequence[tuple[str, ...]], config: TrainConfig) -> list[str]:
    """The order of the outputs: as configured, else integers by value and other names alphabetically."""
    if config.labels is not None:
        return list(dict.fromkeys(config.labels.values()))
    names = {name for row in named for name in row}
    if all(INTEGER.fullmatch(name) for name in names):
        return sorted(names, key=int)
    return sorted(names)


def _check_enough(
    rows: Rows, named: Sequence[tuple[str, ...]], kept: list[int], names: list[str], config: TrainConfig
) -> None:
    rest = 1 - config.train_size
    smallest_share = min(config.train_size, rest * config.valid_size, rest * (1 - config.valid_size))
    needed = 1 if config.split == "guide" else ceil(round(1 / smallest_share, 6))
    if len(kept) < needed:
        raise BadDataset(
            f"the dataset has {len(kept)} distinct texts in {len(rows.texts)} rows, blank ones left out; a split into "
            f"training, validation and test rows needs at least {needed}"
        )
    if len(names) < 2:
        raise BadDataset(f"every row has the label {listed(names) or '(none)'}; a classifier needs at least two labels")
    counts = Counter(name for i in kept for name in named[i])
    for name in names:
        if config.task == "single_label" and counts[name] < needed:
            where = next((rows.row_numbers[i] for i in kept if name in named[i]), None)
            raise BadDataset(
                f"label {shown(name)} has {counts[name]} distinct texts{f' (first in row {where})' if where else ''}; "
                f"a split needs at least {needed} of each label: add rows, or name the labels you mean in --labels"
            )


def _check_parts(report: dict[str, Any], splits: dict[str, Split], config: TrainConfig) -> None:
    """After a cut that looked at no label: whether every part can do what it is for."""
    remedy = "add rows, try another seed, or leave out `--split guide`"
    for part, split in splits.items():
        if not len(split):
            raise BadDataset(f"the guide's split of {report['rows']} rows has no {NAMES[part]} rows; {remedy}")
        for label, found in report["labels"].items():
            if config.task == "single_label" and not found[part]:
                raise BadDataset(
                    f"the guide's split has none of the {sum(found.values())} rows of label {shown(label)} among its "
                    f"{len(split)} {NAMES[part]} rows; {remedy}"
                )
    if not any(map(same_text_key, splits["train"].texts)):
        raise BadDataset("every training row is blank; a dataset needs a header and a label and a text in each row")
