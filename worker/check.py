"""`tweetscore data check`: what a file holds, before anything is trained on it or scored. Knows files, no server."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from training.clean import clean, same_text_key
from training.columns import ID_COLUMNS, LABEL_COLUMNS, TEXT_COLUMNS
from training.encoders import resolve_base_model
from training.sources import open_source
from training.text import TextEncoder, load_tokenizer
from worker.errors import BadRecord
from worker.tweetfiles import read_objects

# Beyond any tweet: a length is measured, not cut.
UNCUT = 100_000
PORTION = 1_000
BOUNDS = (8, 16, 32, 64, 128, 256, 512)
NAMED = 10


@dataclass
class Faults:
    """Lines that cannot be read: how many, and what is wrong with the first."""

    count: int = 0
    named: list[str] = field(default_factory=list)

    def note(self, number: int, fault: str) -> None:
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append(f"line {number}: {fault}")


def check_file(name: str, base_model: str, max_length: int) -> dict[str, Any]:
    """Everything that is worth knowing of a file of labelled rows or tweets, and `advice`, a sentence each.

    Lengths are tokens of the base model, special ones included. Raises `BadSource` or `ModelUnavailable`.
    """
    encoder = resolve_base_model(base_model, None, [Path(base_model).expanduser()])
    encode = TextEncoder(load_tokenizer(encoder.folder))
    columns: dict[str, None] = {}
    faults, portions = Faults(), [_measured([], encode)]
    with open_source(name) as source:
        rows = read_objects(source)
        while portion := list(islice(rows, PORTION)):
            portions.append(_measured(list(_told(portion, columns, faults)), encode))
        found = {"file": source.name, "format": source.format, "encoding": source.encoding_name}
    table = pd.concat(portions, ignore_index=True)
    return found | {"columns": list(columns)} | _summary(table, faults, encoder.name, max_length)


def _told(
    portion: list[tuple[int, Any]], columns: dict[str, None], faults: Faults
) -> Iterator[tuple[int, str, str | None, str | None]]:
    """Line, text, label and id of each row that has a text."""
    for number, row in portion:
        if not isinstance(row, dict):
            faults.note(number, str(row) if isinstance(row, BadRecord) else "it is no object")
            continue
        columns.update(dict.fromkeys(row))
        text, label, id_ = (_first(row, names) for names in (TEXT_COLUMNS, LABEL_COLUMNS, ID_COLUMNS))
        if text is None:
            faults.note(number, "there is no text")
        else:
            yield number, text, label and label.strip(), id_


def _measured(rows: list[tuple[int, str, str | None, str | None]], encode: TextEncoder) -> pd.DataFrame:
    """Rows with their tokens. Texts are remembered by a hash of their key, so that a large file fits."""
    table = pd.DataFrame(rows, columns=["line", "text", "label", "id"], dtype="object")
    keys = table["text"].map(same_text_key)
    table["blank"] = keys == ""
    table["key"] = keys.map(hash).astype("int64")
    table["tokens"] = [len(ids) for ids in encode([clean(text) for text in table.pop("text")], UNCUT)]
    return table.astype({"line": "int64", "label": "str", "id": "str"})


def _summary(table: pd.DataFrame, faults: Faults, base_model: str, max_length: int) -> dict[str, Any]:
    texts = table[~table["blank"]].fillna({"label": ""})
    again = texts["key"].duplicated()
    first = texts.groupby("key")[["line", "label"]].transform("first")
    clashes = again & (texts["label"] != first["label"])
    labels = table.groupby("label", sort=False).size().sort_values(ascending=False, kind="stable")
    pairs = zip(first["line"][clashes], texts["line"][clashes], strict=True)
    found = {
        "rows": len(table), "bad_lines": faults.count, "bad": faults.named, "blank": int(table["blank"].sum()),
        "labels": labels.to_dict(), "duplicates": int(again.sum()),
        "conflicting": int(clashes.sum()), "conflicting_at": [f"lines {a} and {b}" for a, b in islice(pairs, NAMED)],
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
    says = []
    if found["bad_lines"]:
        says.append(
            f"{found['bad_lines']} lines cannot be read: mend them, or `push` leaves them out and `train` refuses"
        )
    if not found["rows"]:
        return [*says, f"no row has a text: name a column {'/'.join(TEXT_COLUMNS)}"]
    if found["blank"]:
        says.append(f"{found['blank']} texts are blank: take them out, they are not trained on")
    if found["conflicting"]:
        says.append(
            f"{found['conflicting']} texts stand under two labels ({', '.join(found['conflicting_at'][:3])}): settle "
            "which; training leaves them out"
        )
    if found["duplicates"]:
        says.append(f"{found['duplicates']} texts are there before: training counts each once")
    if found["labels"] and (found["blank"] or found["conflicting"] or found["duplicates"]):
        says.append("with `--split guide` training takes every row as it is, and tests on texts it was trained on")
    if found["repeated_ids"]:
        says.append(f"{found['repeated_ids']} ids are there before: only the first tweet of an id is stored")
    if truncated := found["tokens"]["truncated"]:
        limit = found["tokens"]["max_length"]
        says.append(f"{truncated} texts are longer than {limit} tokens and would be cut: raise --max-length")
    return [*says, *_advice_on_labels(found["labels"])]


def _advice_on_labels(labels: dict[str, int]) -> Iterator[str]:
    if not labels:
        return
    rare = [label for label, count in labels.items() if count < 10]
    if rare:
        yield f"labels with less than 10 rows cannot be split: {', '.join(rare[:NAMED])}"
    if len(labels) < 2:
        yield "there is one label alone: a classifier needs two"
    if not rare and max(labels.values()) > 5 * min(labels.values()):
        yield "one label is over five times as common as another: try `--set class_weights=balanced`"


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    found = next((row[name] for name in names if row.get(name) not in (None, "")), None)
    if isinstance(found, list):
        return "|".join(map(str, found))
    return None if found is None else str(found)
