"""`tweetscore data check`: report on the contents of a file before training or scoring. Needs no server."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from db.errors import listed
from training.config import make_config
from training.data.columns import ID_COLUMNS, LABEL_COLUMNS, TEXT_COLUMNS
from training.data.numbers import number_of
from training.data.splits import MIN_ROWS_OF_LABEL, USUAL_FOLDS, rows_needed
from training.data.table_file import open_table
from training.model.base_model import resolve_base_model
from training.text.cleaning import clean, same_text_key
from training.text.tokenizer import TextEncoder, load_tokenizer
from worker.errors import BadRecord
from worker.intake.tweet_file import read_objects

# Longer than any tweet, so that lengths are measured without truncation.
MAX_TOKENS = 100_000
CHUNK_ROWS = 1_000
BOUNDS = (8, 16, 32, 64, 128, 256, 512)
MAX_SHOWN = 10


@dataclass
class Faults:
    """Lines that cannot be read: their count, and the messages of the first `MAX_SHOWN`."""

    count: int = 0
    messages: list[str] = field(default_factory=list)

    def add(self, number: int, fault: str) -> None:
        self.count += 1
        if len(self.messages) < MAX_SHOWN:
            self.messages.append(f"line {number}: {fault}")


def check_file(name: str, base_model: str, max_length: int) -> dict[str, Any]:
    """Counts, labels, duplicates and lengths of a file of labelled rows or tweets, and `advice` as sentences.

    Lengths are in tokens of the base model, with special tokens. Raises `BadSource` or `ModelUnavailable`.
    """
    encoder = resolve_base_model(base_model, None, [Path(base_model).expanduser()])
    encode = TextEncoder(load_tokenizer(encoder.folder))
    columns: dict[str, None] = {}
    faults, chunks = Faults(), [_measure([], encode)]
    with open_table(name) as table_file:
        rows = read_objects(table_file)
        while chunk := list(islice(rows, CHUNK_ROWS)):
            chunks.append(_measure(list(_rows_with_text(chunk, columns, faults)), encode))
        found = {"file": table_file.name, "format": table_file.format, "encoding": table_file.encoding_name}
    table = pd.concat(chunks, ignore_index=True)
    return found | {"columns": list(columns)} | _summary(table, faults, encoder.name, max_length)


def _rows_with_text(
    chunk: list[tuple[int, Any]], columns: dict[str, None], faults: Faults
) -> Iterator[tuple[int, str, str | None, str | None]]:
    """Yield line, text, label and id of each row that has a text."""
    for number, row in chunk:
        if not isinstance(row, dict):
            faults.add(number, str(row) if isinstance(row, BadRecord) else "the line is not a JSON object")
            continue
        columns.update(dict.fromkeys(row))
        text, label, id_ = (_first(row, names) for names in (TEXT_COLUMNS, LABEL_COLUMNS, ID_COLUMNS))
        if text is None:
            faults.add(number, "the row has no text")
        else:
            yield number, text, label and label.strip(), id_


def _measure(rows: list[tuple[int, str, str | None, str | None]], encode: TextEncoder) -> pd.DataFrame:
    """A row for each text with its number of tokens. The hash of a text replaces it, so that a large file fits."""
    table = pd.DataFrame(rows, columns=["line", "text", "label", "id"], dtype="object")
    keys = table["text"].map(same_text_key)
    table["blank"] = keys == ""
    table["key"] = keys.map(hash).astype("int64")
    table["tokens"] = [len(ids) for ids in encode([clean(text) for text in table.pop("text")], MAX_TOKENS)]
    return table.astype({"line": "int64", "label": "str", "id": "str"})


def _summary(table: pd.DataFrame, faults: Faults, base_model: str, max_length: int) -> dict[str, Any]:
    texts = table[~table["blank"]].fillna({"label": ""})
    again = texts["key"].duplicated()
    first = texts.groupby("key")[["line", "label"]].transform("first")
    clashes = again & (texts["label"] != first["label"])
    labels = table.groupby("label", sort=False).size().sort_values(ascending=False, kind="stable")
    pairs = zip(first["line"][clashes], texts["line"][clashes], strict=True)
    found = {
        "rows": len(table), "bad_lines": faults.count, "bad": faults.messages, "blank": int(table["blank"].sum()),
        "labels": labels.to_dict(), "duplicates": int(again.sum()),
        "conflicting": int(clashes.sum()),
        "conflicting_at": [f"lines {a} and {b}" for a, b in islice(pairs, MAX_SHOWN)],
        "repeated_ids": int(table["id"].dropna().duplicated().sum()),
        "tokens": {"base_model": base_model, "max_length": max_length, **_lengths(texts["tokens"], max_length)},
    }  # fmt: skip
    return found | {"advice": _advice(found)}


def _lengths(tokens: "pd.Series[int]", max_length: int) -> dict[str, Any]:
    names = [*(f"up to {bound}" for bound in BOUNDS), f"over {BOUNDS[-1]}"]
    counts = pd.cut(tokens, [-1, *BOUNDS, float("inf")], labels=names).value_counts(sort=False)
    some = tokens if len(tokens) else pd.Series([0])
    return {
        "mean": float(some.mean()), "median": float(some.median()), "p99": float(some.quantile(0.99)),
        "longest": int(some.max()), "truncated": int((tokens > max_length).sum()), "histogram": counts.to_dict(),
    }  # fmt: skip


def _advice(found: dict[str, Any]) -> list[str]:
    advice = []
    if found["bad_lines"]:
        advice.append(
            f"{found['bad_lines']} lines cannot be read: correct them; `push` skips them and `train` refuses the file"
        )
    if not found["rows"]:
        return [*advice, f"no row has a text: name a column {'/'.join(TEXT_COLUMNS)}"]
    if found["blank"]:
        advice.append(f"{found['blank']} texts are blank: training leaves them out")
    if found["conflicting"]:
        advice.append(
            f"{found['conflicting']} texts have two labels ({', '.join(found['conflicting_at'][:3])}): keep the right "
            "one; training leaves these texts out"
        )
    if found["duplicates"]:
        advice.append(f"{found['duplicates']} texts are repeated: training uses each once")
    if found["labels"] and (found["blank"] or found["conflicting"] or found["duplicates"]):
        advice.append("with `--split guide` training uses every row, and tests on texts that it also trains on")
    if found["repeated_ids"]:
        advice.append(f"{found['repeated_ids']} ids are repeated: only the first tweet of an id is stored")
    if truncated := found["tokens"]["truncated"]:
        limit = found["tokens"]["max_length"]
        advice.append(f"{truncated} texts are longer than {limit} tokens and will be truncated: raise --max-length")
    return [*advice, *_advice_on_labels(found["labels"])]


def _advice_on_labels(labels: dict[str, int]) -> Iterator[str]:
    if not labels:
        return
    enough = rows_needed(make_config())
    rare = [label for label, count in labels.items() if count < MIN_ROWS_OF_LABEL]
    few = [label for label, count in labels.items() if MIN_ROWS_OF_LABEL <= count < enough]
    if len(labels) > 2 and all(number_of(label) is not None for label in labels):
        yield (
            "the labels are numbers: if they are levels, `train --task ordinal` learns their order, and "
            "`train --task continuous` predicts a number"
        )
    if rare:
        yield f"labels with fewer than {MIN_ROWS_OF_LABEL} rows cannot be split; add rows: {listed(rare[:MAX_SHOWN])}"
    if few:
        folds = min(USUAL_FOLDS, *(labels[label] for label in few))
        yield (
            f"labels with fewer than {enough} rows: {listed(few[:MAX_SHOWN])}; their test figures and macro-F1 "
            f"will say next to nothing: label more rows, or train with --folds {folds}"
        )
    if len(labels) < 2:
        yield "there is only one label: a classifier needs two"
    if not rare and not few and max(labels.values()) > 5 * min(labels.values()):
        yield "one label is over five times as frequent as another: try `--set class_weights=balanced`"


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    found = next((row[name] for name in names if row.get(name) not in (None, "")), None)
    if isinstance(found, list):
        return "|".join(map(str, found))
    return None if found is None else str(found)
