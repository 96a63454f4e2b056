"""The training loop of a masked language model. Takes rows of token ids. Uses no SQL and no queue."""

import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from training import failpoint
from training.config import AdaptConfig
from training.errors import StopRequested
from training.loop.checkpoints import Checkpoints, Progress, RunState
from training.loop.fit import TOKENS_AT_ONCE, build_optimizer, build_scheduler
from training.model.batching import Ids, cut, pad_arrays, plan_batches, shuffled_batches
from training.model.classifier import half_precision
from training.model.kernels import training_kernels
from training.model.language_model import LanguageModel
from training.model.masking import Masking

TokenIds = NDArray[np.int32]

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
        for batch in self._batches(progress.epoch)[progress.batch :]:
            value = self._backward(batch)
            if self.config.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            progress.learning_rate = self.state.optimizer.param_groups[0]["lr"]
            self.state.optimizer.step()
            self.state.optimizer.zero_grad(set_to_none=True)
            self.state.scheduler.step()
            progress.loss_sum += value * len(batch)
            progress.batch += 1
            progress.step += 1
            trained += len(batch)
            failpoint.passing("stepped")
            self.report_step(value, trained / (time.monotonic() - started))
            if time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
                self._save()

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
        self.checkpoints.save(self.state)
        self.saved_at = time.monotonic()

    def _backward(self, batch: list[int]) -> float:
        """Compute the gradient of one step. Returns its loss, the mean over the hidden tokens of the batch."""
        masked = {
            row: self._masked(self.inputs.train[row], self.config.seed, self.progress.epoch, row) for row in batch
        }
        hidden = max(1, sum(int((targets != NO_TARGET).sum()) for _, targets in masked.values()))
        value = 0.0
        for index in cut(batch, self.lengths, TOKENS_AT_ONCE.get(self.device.type, TOKENS_AT_ONCE["cuda"])):
            loss = self._loss([masked[row] for row in index]) / hidden
            loss.backward()  # type: ignore[no-untyped-call]
            value += loss.item()
        return value

    @torch.inference_mode()
    def held_out_loss(self) -> float:
        """Return the mean loss of the hidden tokens of the held-out rows."""
        self.model.eval()
        rows = self.inputs.held_out
        total, hidden = 0.0, 0
        for index in plan_batches([len(row) for row in rows], batch_size=self.config.valid_batch_size):
            masked = [self._masked(rows[row], HELD_OUT_SEED, row) for row in index]
            total += float(self._loss(masked))
            hidden += sum(int((targets != NO_TARGET).sum()) for _, targets in masked)
            self.report_step()
        return total / max(1, hidden)

    def _masked(self, row: TokenIds, *seed: int) -> tuple[Ids, Ids]:
        """Return token ids of which some are hidden, and the tokens to predict, `NO_TARGET` for the others."""
        ids, chosen = self.inputs.masking(row, *seed)
        targets = row.astype(np.int64)
        targets[~chosen] = NO_TARGET
        return ids, targets

    def _loss(self, masked: Sequence[tuple[Ids, Ids]]) -> torch.Tensor:
        """Return the sum of the losses of the hidden tokens."""
        ids, mask = pad_arrays([ids for ids, _ in masked], self.inputs.pad_id)
        targets, _ = pad_arrays([targets for _, targets in masked], NO_TARGET)
        to_predict = torch.from_numpy(targets).to(self.device)
        chosen = to_predict != NO_TARGET  # (B, T)
        with self.autocast:
            logits = self.model(torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device), chosen)
        return cross_entropy(logits.float(), to_predict[chosen], reduction="sum")
