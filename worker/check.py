"""`tweetscore data check`: what a file holds, before anything is trained on it or scored. Knows files, no server."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from training.clean import clean, same_text_key
from training.columns import ID_COLUMNS, LABEL_COLUMNS, TEXT_COLUMNS
from training.encoders import resolve_encoder
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
class Seen:
    """What has been read so far. Texts are remembered by a hash of their key, so that a large file fits."""

    columns: dict[str, None] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    bad_count: int = 0
    rows: int = 0
    blank: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    texts: dict[int, tuple[str, int]] = field(default_factory=dict)
    duplicates: int = 0
    conflicting: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    repeated_ids: int = 0
    lengths: list[int] = field(default_factory=list)

    def note_bad(self, number: int, fault: BadRecord) -> None:
        self.bad_count += 1
        if len(self.bad) < NAMED:
            self.bad.append(f"line {number}: {fault}")

    def note(self, number: int, row: dict[str, Any]) -> str | None:
        """Take a row in; returns its text, None when there is none to measure."""
        self.columns.update(dict.fromkeys(row))
        text, label, id_ = (_first(row, names) for names in (TEXT_COLUMNS, LABEL_COLUMNS, ID_COLUMNS))
        if text is None:
            self.note_bad(number, BadRecord("there is no text"))
            return None
        self.rows += 1
        if label is not None:
            self.labels[label.strip()] += 1
        if id_ is not None:
            self.repeated_ids += id_ in self.ids
            self.ids.add(id_)
        key = same_text_key(text)
        if not key:
            self.blank += 1
            return None
        first = self.texts.setdefault(hash(key), ((label or "").strip(), number))
        if first[1] != number:
            self.duplicates += 1
            if first[0] != (label or "").strip():
                self.conflicting.append(f"lines {first[1]} and {number}")
        return text


def check_file(name: str, base_model: str, max_length: int) -> dict[str, Any]:
    """Everything that is worth knowing of a file of labelled rows or tweets, and `advice`, a sentence each.

    Lengths are tokens of the base model, special ones included. Raises `BadSource` or `ModelUnavailable`.
    """
    encoder = resolve_encoder(base_model, None, [Path(base_model).expanduser()])
    encode, seen = TextEncoder(load_tokenizer(encoder.folder)), Seen()
    with open_source(name) as source:
        rows = read_objects(source)
        while portion := list(islice(rows, PORTION)):
            texts = []
            for number, row in portion:
                if isinstance(row, BadRecord):
                    seen.note_bad(number, row)
                elif not isinstance(row, dict):
                    seen.note_bad(number, BadRecord("it is no object"))
                elif (text := seen.note(number, row)) is not None:
                    texts.append(clean(text))
            seen.lengths += map(len, encode(texts, UNCUT))
        found = {"file": source.name, "format": source.format, "encoding": source.encoding_name}
    return found | _summary(seen, encoder.name, max_length)


def _summary(seen: Seen, base_model: str, max_length: int) -> dict[str, Any]:
    lengths = np.array(seen.lengths or [0])
    places = np.searchsorted(BOUNDS, lengths)
    names = [f"up to {bound}" for bound in BOUNDS] + [f"over {BOUNDS[-1]}"]
    truncated = int((lengths > max_length).sum())
    tokens = {
        "base_model": base_model, "mean": float(lengths.mean()), "median": float(np.median(lengths)),
        "p99": float(np.percentile(lengths, 99)), "longest": int(lengths.max()), "max_length": max_length,
        "truncated": truncated, "histogram": {name: int((places == i).sum()) for i, name in enumerate(names)},
    }  # fmt: skip
    return {
        "columns": list(seen.columns), "rows": seen.rows, "bad_lines": seen.bad_count, "bad": seen.bad,
        "blank": seen.blank, "labels": dict(seen.labels.most_common()), "duplicates": seen.duplicates,
        "conflicting": len(seen.conflicting), "conflicting_at": seen.conflicting[:NAMED],
        "repeated_ids": seen.repeated_ids, "tokens": tokens, "advice": _advice(seen, truncated, max_length),
    }  # fmt: skip


def _advice(seen: Seen, truncated: int, max_length: int) -> list[str]:
    says = []
    if seen.bad_count:
        says.append(f"{seen.bad_count} lines cannot be read: mend them, or `push` leaves them out and `train` refuses")
    if not seen.rows:
        return [*says, f"no row has a text: name a column {'/'.join(TEXT_COLUMNS)}"]
    if seen.blank:
        says.append(f"{seen.blank} texts are blank: take them out, they are not trained on")
    if seen.conflicting:
        says.append(
            f"{len(seen.conflicting)} texts stand under two labels ({', '.join(seen.conflicting[:3])}): settle which; "
            "training leaves them out"
        )
    if seen.duplicates:
        says.append(f"{seen.duplicates} texts are there before: training counts each once")
    if seen.repeated_ids:
        says.append(f"{seen.repeated_ids} ids are there before: only the first tweet of an id is stored")
    if truncated:
        says.append(f"{truncated} texts are longer than {max_length} tokens and would be cut: raise --max-length")
    if seen.labels:
        rare = [label for label, count in seen.labels.items() if count < 10]
        if rare:
            says.append(f"labels with less than 10 rows cannot be split: {', '.join(rare[:NAMED])}")
        if len(seen.labels) < 2:
            says.append("there is one label alone: a classifier needs two")
        most, least = max(seen.labels.values()), min(seen.labels.values())
        if not rare and most > 5 * least:
            says.append("one label is over five times as common as another: try `--set class_weights=balanced`")
    return says


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    found = next((row[name] for name in names if row.get(name) not in (None, "")), None)
    if isinstance(found, list):
        return "|".join(map(str, found))
    return None if found is None else str(found)
