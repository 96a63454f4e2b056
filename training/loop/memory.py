"""How much of a batch a device computes at once: halved when it is out of memory, with the same result."""

import gc
import logging
from collections.abc import Callable, Sequence
from sys import maxsize
from typing import TypeVar

import torch
from torch import Tensor

from training.errors import OutOfMemory
from training.model.batching import cut
from training.model.devices import is_out_of_memory

Result = TypeVar("Result")

log = logging.getLogger(__name__)

# Tokens of one forward and backward pass, padding included. With fewer, a CPU spends its time on casting the weights to
# bfloat16 for every pass; with more, it is not faster, and a GPU is full.
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16_384}


def tokens_at_once(device: torch.device) -> int:
    return TOKENS_AT_ONCE.get(device.type, TOKENS_AT_ONCE["cuda"])


class TokenBudget:
    """The most tokens of one pass through a model, padding included. Running out of memory halves it.

    `lengths` are the tokens of all rows. Batches that are not `divisible` stay whole. `lowered_to` is what is left
    after the memory was full: None before.
    """

    def __init__(
        self,
        device: torch.device,
        lengths: Sequence[int],
        tokens: int = maxsize,
        *,
        divisible: bool = True,
        lowered_to: int | None = None,
    ) -> None:
        self._device, self._lengths, self._tokens, self._divisible = device, lengths, tokens, divisible
        self.lowered_to = lowered_to

    def cut(self, batches: list[list[int]]) -> list[list[int]]:
        """Cut batches of row numbers into pieces that may be computed at once."""
        if not self._divisible:
            return batches
        tokens = min(self._tokens, self.lowered_to or maxsize)
        return [piece for batch in batches for piece in cut(batch, self._lengths, tokens)]

    def run(self, batches: list[list[int]], compute: Callable[[list[list[int]]], Result]) -> Result:
        """Return `compute(pieces)` for the pieces of the batches.

        Out of memory, it runs again with smaller pieces and the same random numbers, and later batches are cut the same
        way. So `compute` must begin anew with every call. Raises `OutOfMemory` when no smaller pieces are possible.
        """
        while True:
            pieces = self.cut(batches)
            before = _random_state(self._device)
            try:
                return compute(pieces)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._lower(pieces, error)
            # Not within the handler: there the error still holds the tensors of the failed pass.
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            _restore_random_state(self._device, before)

    def _lower(self, pieces: list[list[int]], error: Exception) -> None:
        largest = max(pieces, key=self._size)
        rows, longest = len(largest), max(self._lengths[row] for row in largest)
        if not self._divisible:
            raise OutOfMemory(
                f"a batch of {rows} rows of {longest} tokens does not fit into the memory of {self._device}, and the "
                "guide's head cannot train on a part of it; set a smaller train_batch_size or max_length"
            ) from error
        if rows == 1:
            raise OutOfMemory(
                f"a single row of {longest} tokens does not fit into the memory of {self._device}; set a smaller "
                "max_length or choose a smaller base model"
            ) from error
        self.lowered_to = self._size(largest) // 2
        log.warning(
            "out of memory on %s with %d rows of %d tokens; from now on at most %d tokens at once",
            self._device, rows, longest, self.lowered_to,
        )  # fmt: skip

    def _size(self, piece: list[int]) -> int:
        return len(piece) * max(self._lengths[row] for row in piece)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    of_cpu, of_device = state
    torch.set_rng_state(of_cpu)
    if of_device is not None:
        torch.cuda.set_rng_state(of_device, device)
