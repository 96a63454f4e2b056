"""Pack texts into rows of a fixed length, several to a row, so that a device computes almost no padding.

Pure functions over token ids; `packed_network.py` runs the rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from training.model.batching import Ids

# Tokens of a row: long enough to be filled by tweets of about 20 tokens, short enough for attention within the row.
ROW_TOKENS = 128
# Texts in a row at most: the last layer computes this many vectors a row.
ROW_TEXTS = 32


@dataclass(frozen=True)
class PackedRows:
    """R rows of T tokens that hold N texts.

    `ids`, `positions` and `texts` are (R, T) int64: token ids, positions that start at 0 in each text, and the number
    of the text within its row, from 1; 0 is padding. `first` (R, `ROW_TEXTS`) int64 is the place of each text's first
    token. `slots` (N,) int64 is where a text stands among the R * `ROW_TEXTS` places of results.
    """

    ids: Ids
    positions: Ids
    texts: Ids
    first: Ids
    slots: Ids


def plan_rows(lengths: Sequence[int], row_tokens: int = ROW_TOKENS, row_texts: int = ROW_TEXTS) -> list[list[int]]:
    """Return rows of numbers of texts: best fit, longest texts first. A row has at most `row_tokens` tokens.

    Raises `ValueError` for a text that is longer than a row.
    """
    if max(lengths, default=0) > row_tokens:
        raise ValueError(f"a text has {max(lengths)} tokens, and a row {row_tokens}")
    rows: list[list[int]] = []
    with_room: list[list[int]] = [
        [] for _ in range(row_tokens + 1)
    ]  # numbers of rows, by the tokens they have room for
    rooms = 0  # bit n is set while there are rows with room for n tokens: the best fit is the lowest of some bits
    for text in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[text]
        fitting = rooms >> length
        if fitting:
            room = (fitting & -fitting).bit_length() - 1 + length
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            rows[row].append(text)
        else:
            room, row = row_tokens, len(rows)
            rows.append([text])
        if room > length and len(rows[row]) < row_texts:
            with_room[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows


def pack(
    rows: Sequence[Sequence[int]], plan: Sequence[Sequence[int]], height: int, pad_id: int, row_tokens: int = ROW_TOKENS
) -> PackedRows:
    """Return the token ids `rows`, packed as `plan` says, in `height` rows; the rows after the plan's are padding."""
    order = list(chain.from_iterable(plan))
    counts = np.fromiter(map(len, plan), np.int64, len(plan))
    lengths = np.fromiter((len(rows[i]) for i in order), np.int64, len(order))
    row = np.repeat(np.arange(len(plan)), counts)  # (N,) the row of each text
    place = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)  # (N,) its number within the row
    before = lengths.cumsum() - lengths  # tokens of all texts before it
    start = before - np.repeat(before[counts.cumsum() - counts], counts) if order else before  # its first token's place
    positions = np.arange(lengths.sum()) - np.repeat(before, lengths)
    target = np.repeat(row * row_tokens + start, lengths) + positions

    def filled(values: Ids, empty: int) -> Ids:
        made = np.full(height * row_tokens, empty, np.int64)
        made[target] = values
        return made.reshape(height, row_tokens)

    ids = np.fromiter(chain.from_iterable(rows[i] for i in order), np.int64, int(lengths.sum()))
    first = np.zeros((height, ROW_TEXTS), np.int64)
    first[row, place] = start
    return PackedRows(
        filled(ids, pad_id), filled(positions, 0), filled(np.repeat(place + 1, lengths), 0), first,
        row * ROW_TEXTS + place,
    )  # fmt: skip
