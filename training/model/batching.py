"""Group rows of token ids into batches: shuffled for training, planned for prediction, and padded for a model.

Pure functions. Planning uses only the lengths of rows; `pad` and `pad_arrays` build the arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil
from sys import maxsize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Batch:
    """The arrays of one forward, and the numbers of the rows that it gives logits for, in their order.

    `tokens` are computed, padding included. A batch that is not `divisible` is as small as can be.
    """

    arrays: tuple[Ids, ...]
    rows: list[int]
    tokens: int
    divisible: bool


# Batches whose rows are sorted together: enough for similar lengths, few enough to keep the epoch shuffled.
BATCHES_SORTED_TOGETHER = 16


def shuffled_batches(lengths: Sequence[int], batch_size: int, seed: int) -> list[list[int]]:
    """Return the batches of one epoch: every row once, rows of similar length together, batches in random order.

    The same seed gives the same batches. A batch of a single row is merged into the one before it, because BatchNorm
    cannot train on one row.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    pool = batch_size * BATCHES_SORTED_TOGETHER
    batches: list[list[int]] = []
    for start in range(0, len(order), pool):
        similar = sorted(order[start : start + pool], key=lengths.__getitem__)
        batches += [similar[i : i + batch_size] for i in range(0, len(similar), batch_size)]
    single = next((i for i, batch in enumerate(batches) if len(batch) == 1), None)
    if single is not None and len(batches) > 1:
        row = batches.pop(single)
        batches[single - 1] += row
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def plan_batches(
    lengths: Sequence[int], *, token_budget: int | None = None, batch_size: int | None = None
) -> list[list[int]]:
    """Return batches of row indices, longest rows first. Each has longest * rows <= `token_budget` and at most
    `batch_size` rows.

    Sorting by length keeps padding low. The longest batch comes first, so that a device that is too small for it fails
    at once. A row longer than the budget is a batch by itself.
    """
    most_tokens, most_rows = token_budget or maxsize, batch_size or maxsize
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rows = len(batches[-1]) + 1 if batches else 0
        if batches and rows <= most_rows and lengths[batches[-1][0]] * rows <= most_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def padded_batches(rows: Sequence[Sequence[int]], token_budget: int, pad_id: int) -> list[Batch]:
    """Return batches whose arrays are ids (B, T) and mask (B, T), as `plan_batches` cuts them."""
    batches = []
    for index in plan_batches([len(row) for row in rows], token_budget=token_budget):
        ids, mask = pad_arrays([rows[i] for i in index], pad_id)
        batches.append(Batch((ids, mask), index, ids.size, len(index) > 1))
    return batches


def cut(batch: list[int], lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Split a batch into the fewest pieces of about equal size that have at most `token_budget` tokens, padding
    included. A row longer than the budget is a piece by itself."""
    tokens = len(batch) * max(lengths[row] for row in batch)
    pieces = min(ceil(tokens / token_budget), len(batch))
    return [piece.tolist() for piece in np.array_split(np.array(batch), pieces)]


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return token ids (B, T) int64, padded to the longest row, and the mask (B, T) int64, 1 for real tokens."""
    ids, mask = pad_arrays(rows, pad_id)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def pad_arrays(rows: Sequence[Sequence[int] | Ids], pad_id: int) -> tuple[Ids, Ids]:
    """Like `pad`, as NumPy arrays."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    mask = np.arange(lengths.max()) < lengths[:, None]  # (B, T)
    ids = np.full(mask.shape, pad_id, np.int64)
    # One assignment for the whole batch: row-major order is the order of the rows.
    ids[mask] = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
    return ids, mask.astype(np.int64)
