"""Pure functions from rows of token ids to batches: shuffled for training, planned for prediction, padded for a model.

Planning works on lengths and counts only; `pad` and `pad_arrays` build the tensors at the end.
"""

from collections.abc import Sequence
from itertools import chain
from math import ceil
from sys import maxsize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]

# Batches whose rows are sorted together: enough to make lengths alike, few enough to keep the epoch shuffled.
BATCHES_SORTED_TOGETHER = 16


def shuffled_batches(lengths: Sequence[int], batch_size: int, seed: int) -> list[list[int]]:
    """One epoch: every row once, rows of like length together, batches in random order, the same for the same seed.

    No batch has a single row, since BatchNorm cannot train on one: the last row joins the batch before it.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    pool = batch_size * BATCHES_SORTED_TOGETHER
    batches: list[list[int]] = []
    for start in range(0, len(order), pool):
        alike = sorted(order[start : start + pool], key=lengths.__getitem__)
        batches += [alike[i : i + batch_size] for i in range(0, len(alike), batch_size)]
    single = next((i for i, batch in enumerate(batches) if len(batch) == 1), None)
    if single is not None and len(batches) > 1:
        row = batches.pop(single)
        batches[single - 1] += row
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def plan_batches(
    lengths: Sequence[int], *, token_budget: int | None = None, batch_size: int | None = None
) -> list[list[int]]:
    """Indices of the rows in batches of like length, longest first, each with longest x rows <= `token_budget` and at
    most `batch_size` rows.

    Sorting keeps padding low; the longest batch comes first, so that a device too small for it fails at once. A row
    longer than the budget makes a batch of its own.
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


def cut(batch: list[int], lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Split a batch into the fewest pieces of about equal count with at most `token_budget` tokens each, padding
    included, and at least two rows each."""
    tokens = len(batch) * max(lengths[row] for row in batch)
    pieces = max(1, min(ceil(tokens / token_budget), len(batch) // 2))
    return [piece.tolist() for piece in np.array_split(np.array(batch), pieces)]


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) int64 padded to the longest row, and the mask (B, T) int64 that is 1 on real tokens."""
    ids, mask = pad_arrays(rows, pad_id)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def pad_arrays(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Ids, Ids]:
    """The same as NumPy arrays."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    mask = np.arange(lengths.max()) < lengths[:, None]  # (B, T)
    ids = np.full(mask.shape, pad_id, np.int64)
    # One assignment for the whole batch: row-major order is the order of the rows.
    ids[mask] = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
    return ids, mask.astype(np.int64)
