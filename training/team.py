"""The processes that train one model together, as the training loop sees them. Knows tensors and rows, no model's kind.

A step's rows are the same however many processes there are: each takes its share of every batch. So a run that several
began, one can end, and the other way round, and what was tuned for one GPU holds on four.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import Tensor, nn

Value = TypeVar("Value")


class Team:
    """One process alone. What several do together is called by all of them, in the same order."""

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes checkpoints and speaks to the outside."""
        return self.rank == 0

    def share(self, rows: list[int]) -> tuple[list[int], float]:
        """Which of a batch's rows this process computes, and how much each counts when all add up what they found."""
        return rows, 1.0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of what each process has."""
        return values

    def tell(self, ask: Callable[[], Value]) -> Value:
        """What the leader's `ask` returns. Where it raises, so do all: the leader as it is, the others to stop."""
        return ask()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward leaves in every process the mean of all their gradients."""
        return model

    def unsynced(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A backward whose gradients wait for those of the next."""
        return nullcontext()

    def begin_step(self, seed: int, step: int) -> None:
        """Called before each step, for what is drawn at random in it."""


ALONE = Team()
