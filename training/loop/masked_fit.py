"""The training loop of a masked language model. Takes rows of token ids. Uses no SQL and no queue."""

import gc
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from training import failpoint
from training.config import AdaptConfig
from training.errors import StopRequested
from training.loop.checkpoints import Checkpoints, Progress, RunState
from training.loop.fit import build_optimizer, build_scheduler, update
from training.loop.memory import TokenBudget, tokens_at_once
from training.loop.overlap import StepLosses, ahead, pinned
from training.model.batching import Ids, pad_arrays, plan_batches, shuffled_batches
from training.model.classifier import half_precision
from training.model.kernels import training_kernels
from training.model.language_model import LanguageModel
from training.model.masking import Masking

TokenIds = NDArray[np.int32]
# Row -> token ids of which some are hidden, and the tokens to predict, `NO_TARGET` for the others.
Masked = dict[int, tuple[Ids, Ids]]

log = logging.getLogger(__name__)

# The epochs of this loop can take an hour, so there are also checkpoints within an epoch.
CHECKPOINT_SECONDS = 120.0
NO_TARGET = -1
# The held-out rows are masked the same way in every run, so that the losses of several runs can be compared.
HELD_OUT_SEED = 0

# (step, total steps, loss, rows per second); the last two are None when no step was made. May raise to stop the run.
OnStep = Callable[[int, int, float | None, float | None], None]


@dataclass(frozen=True)
class MaskedFitInputs:
    """The data and configuration of a run: rows of token ids to train on, and held-out rows that measure the loss."""

    train: Sequence[TokenIds]
    held_out: Sequence[TokenIds]
    masking: Masking
    config: AdaptConfig
    pad_id: int


@dataclass(frozen=True)
class Losses:
    """Mean loss of the hidden tokens of the held-out rows, before and after the training, in nats."""

    before: float
    after: float


def masked_fit(
    model: LanguageModel, inputs: MaskedFitInputs, *, device: torch.device, checkpoints: Checkpoints, on_step: OnStep
) -> Losses:
    """Train `model` on `device` for all epochs of the configuration.

    Resumes from the newest checkpoint, if there is one, with the same result as an uninterrupted run on the same rows:
    the order of the batches follows from seed and epoch, the hidden tokens from seed, epoch and row, and the checkpoint
    stores everything else. When `on_step` raises `StopRequested`, a checkpoint is saved first.
    """
    torch.manual_seed(inputs.config.seed)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    run = _Run(model.to(device), inputs, device, checkpoints, on_step)
    progress = run.progress
    run.report_step()
    with training_kernels(model, device):
        if not progress.history:
            progress.history.append({"epoch": 0, "loss": run.held_out_loss()})
        while progress.epoch <= inputs.config.epochs:
            run.train_epoch()
            run.end_epoch()
    model.eval()
    return Losses(progress.history[0]["loss"], progress.history[-1]["loss"])


@dataclass(frozen=True)
class Piece:
    """Rows that are computed at once: ids (B, T), mask (B, T), the positions (M,) of the hidden tokens among the B * T,
    and the tokens (M,) to predict there."""

    rows: list[int]
    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    wanted: torch.Tensor


@dataclass(frozen=True)
class Prepared:
    """A batch: its rows, the number of hidden tokens in them, and the pieces that the batch is cut into."""

    masked: Masked
    hidden: int
    pieces: list[Piece]


class _Run:
    """State and steps of one run of `masked_fit`."""

    def __init__(
        self,
        model: LanguageModel,
        inputs: MaskedFitInputs,
        device: torch.device,
        checkpoints: Checkpoints,
        on_step: OnStep,
    ) -> None:
        self.inputs, self.config, self.device = inputs, inputs.config, device
        self.checkpoints, self.on_step = checkpoints, on_step
        self.lengths = [len(row) for row in inputs.train]
        steps_per_epoch = len(self._batches(epoch=0))
        optimizer = build_optimizer(model, self.config)
        self.model = model
        self.state = RunState(model, optimizer, build_scheduler(optimizer, self.config, steps_per_epoch), Progress())
        if checkpoints.restore(self.state):
            log.info("resuming from step %d", self.state.progress.step)
        self.progress = self.state.progress
        left = steps_per_epoch * (self.config.epochs - self.progress.epoch + 1) - self.progress.batch
        # A resumed run has fewer rows than before when tweets were deleted meanwhile.
        self.total_steps = self.progress.step + max(0, left)
        half = half_precision(device, self.config.precision)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
        self.losses = StepLosses(device)
        lowered = self.progress.tokens_at_once
        self.budget = TokenBudget(device, self.lengths, tokens_at_once(device), lowered_to=lowered)
        self.saved_at = time.monotonic()

    def _batches(self, epoch: int) -> list[list[int]]:
        return shuffled_batches(self.lengths, self.config.train_batch_size, self.config.seed + epoch)

    def report_step(self, loss: float | None = None, rows_per_second: float | None = None) -> None:
        """Call `on_step`, which may raise to stop the run. On `StopRequested` save a checkpoint first."""
        try:
            self.on_step(self.progress.step, self.total_steps, loss, rows_per_second)
        except StopRequested:
            self._save()
            raise

    def train_epoch(self) -> None:
        """Run the steps of the epoch that are not done yet."""
        progress, trained, started = self.progress, 0, time.monotonic()
        self.model.train()
        batches = self._batches(progress.epoch)[progress.batch :]
        with closing(ahead(batches, self._prepare, self.device)) as prepared:
            for batch, ready in zip(batches, prepared, strict=True):
                losses = self._backward(batch, ready)
                update(self.state, self.config)
                trained += len(batch)
                value = self.losses.add(losses, partial(self._note, len(batch)))
                failpoint.passing("stepped")
                self.report_step(value, trained / (time.monotonic() - started))
                if time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
                    self._save()
        self.losses.read()

    def end_epoch(self) -> None:
        """Measure the held-out loss and save a checkpoint from which the next epoch begins."""
        progress = self.progress
        figures = {
            "epoch": progress.epoch,
            "train_loss": progress.loss_sum / len(self.inputs.train),
            "loss": self.held_out_loss(),
        }
        failpoint.passing("validated")
        log.info("Epoch: %(epoch)d, Loss: %(train_loss).4f, held-out loss: %(loss).4f", figures)
        progress.history.append(figures)
        progress.epoch, progress.batch, progress.loss_sum = progress.epoch + 1, 0, 0.0
        self._save()
        failpoint.passing("checkpointed")

    def _save(self) -> None:
        self.losses.read()
        self.checkpoints.save(self.state)
        self.saved_at = time.monotonic()

    def _prepare(self, batch: list[int]) -> Prepared:
        epoch = self.progress.epoch
        masked = {row: self._masked(self.inputs.train[row], self.config.seed, epoch, row) for row in batch}
        return Prepared(masked, _hidden(masked), [self._piece(rows, masked) for rows in self.budget.cut([batch])])

    def _piece(self, rows: list[int], masked: Masked) -> Piece:
        ids, mask = pad_arrays([masked[row][0] for row in rows], self.inputs.pad_id)
        targets, _ = pad_arrays([masked[row][1] for row in rows], NO_TARGET)
        positions = np.flatnonzero(targets != NO_TARGET)
        arrays = (ids, mask, positions, targets.ravel()[positions])
        return Piece(rows, *(pinned(torch.from_numpy(array), self.device) for array in arrays))

    def _backward(self, batch: list[int], prepared: Prepared) -> list[torch.Tensor]:
        """Compute the gradient of one step. Returns the parts of its loss, the mean over the batch's hidden tokens."""

        def compute(cut: list[list[int]]) -> list[torch.Tensor]:
            self.state.optimizer.zero_grad(set_to_none=True)  # that of a pass that was out of memory
            losses = []
            for piece in self._pieces(prepared, cut):
                loss = self._loss(piece) / max(1, prepared.hidden)
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach())
            return losses

        losses = self.budget.run([batch], compute)
        self.progress.tokens_at_once = self.budget.lowered_to
        return losses

    def _pieces(self, prepared: Prepared, cut: list[list[int]]) -> Iterable[Piece]:
        """Return the pieces `cut`: those that are prepared, unless the budget has been lowered since."""
        if [piece.rows for piece in prepared.pieces] == cut:
            return prepared.pieces
        return (self._piece(rows, prepared.masked) for rows in cut)

    def _note(self, rows: int, loss: float) -> None:
        """Count the loss of a step when it is read."""
        self.progress.loss_sum += loss * rows

    @torch.inference_mode()
    def held_out_loss(self) -> float:
        """Return the mean loss of the hidden tokens of the held-out rows."""
        self.model.eval()
        rows = self.inputs.held_out
        lengths = [len(row) for row in rows]
        budget = TokenBudget(self.device, lengths)
        total, hidden = 0.0, 0
        for index in plan_batches(lengths, batch_size=self.config.valid_batch_size):
            masked = {row: self._masked(rows[row], HELD_OUT_SEED, row) for row in index}
            total += budget.run([index], partial(self._total_loss, masked))
            hidden += _hidden(masked)
            self.report_step()
        return total / max(1, hidden)

    def _total_loss(self, masked: Masked, cut: list[list[int]]) -> float:
        return sum(float(self._loss(self._piece(rows, masked))) for rows in cut)

    def _masked(self, row: TokenIds, *seed: int) -> tuple[Ids, Ids]:
        """Return token ids of which some are hidden, and the tokens to predict, `NO_TARGET` for the others."""
        ids, chosen = self.inputs.masking(row, *seed)
        targets = row.astype(np.int64)
        targets[~chosen] = NO_TARGET
        return ids, targets

    def _loss(self, piece: Piece) -> torch.Tensor:
        """Return the sum of the losses of the hidden tokens."""
        parts = (piece.ids, piece.mask, piece.positions, piece.wanted)
        ids, mask, positions, wanted = (part.to(self.device, non_blocking=True) for part in parts)
        with self.autocast:
            logits = self.model(ids, mask, positions)
        return cross_entropy(logits.float(), wanted, reduction="sum")


def _hidden(masked: Masked) -> int:
    """Return the number of hidden tokens."""
    return sum(int((targets != NO_TARGET).sum()) for _, targets in masked.values())
