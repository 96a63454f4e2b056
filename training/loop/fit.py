"""The training loop, a plain function: rows in, the best epoch's weights left in the model. Knows no SQL, no queue."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from training import failpoint
from training.config import TrainConfig
from training.data.dataset import Split
from training.errors import StopRequested
from training.evaluation.decisions import Floats
from training.evaluation.epoch import Epoch
from training.evaluation.metrics import metrics
from training.loop.checkpoints import Checkpoints, Progress, RunState
from training.loop.predict import loss_function, predict
from training.model.batching import cut, pad, shuffled_batches
from training.model.classifier import Classifier, half_precision
from training.reporting.tensorboard import TensorBoardWriter

# Of one forward and backward, padding included: a CPU gains nothing from more, a GPU is full.
TOKENS_AT_ONCE = {"cpu": 512, "cuda": 16_384}


@dataclass(frozen=True)
class Hooks:
    """Called after every step (step, total steps, loss, samples a second) and epoch. `on_step` may raise to stop."""

    on_resume: Callable[[Progress], None] = lambda progress: None
    on_step: Callable[[int, int, float | None, float | None], None] = lambda step, total, loss, rate: None
    on_epoch: Callable[[Epoch], None] = lambda epoch: None


@dataclass(frozen=True)
class FitInputs:
    """What `fit` learns from, as plain values. Rows are lists of token ids."""

    train: Split
    valid: Split
    train_rows: list[list[int]]
    valid_rows: list[list[int]]
    labels: list[str]
    config: TrainConfig
    pad_id: int


def fit(
    model: Classifier,
    inputs: FitInputs,
    *,
    device: torch.device,
    checkpoints: Checkpoints,
    board_folder: Path,
    hooks: Hooks,
) -> list[Epoch]:
    """Train on `device`, leaving the best epoch's weights in `model` (the guide keeps the last; see `as_good`).

    Goes on from the newest checkpoint when there is one, to the same result as an unbroken run: the order of the
    batches follows from seed and epoch, everything else is in the checkpoint. A `StopRequested` raised by a hook leaves
    a checkpoint behind. Returns the figures of every epoch.
    """
    torch.manual_seed(inputs.config.seed)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    loop = _Loop(model.to(device), inputs, device, checkpoints, hooks)
    with TensorBoardWriter(board_folder, loop.at.step) as board:
        loop.look_up()
        while loop.at.epoch <= inputs.config.epochs and not out_of_patience(loop.at.history, inputs.config):
            started = time.monotonic()
            loop.train(board, started)
            epoch, said = loop.validate(started)
            loop.keep(epoch)
            board.epoch(loop.at.step, epoch, inputs.valid, said, inputs.labels, inputs.config.task)
            hooks.on_epoch(epoch)
        loop.end()
        model.eval()
        board.graph(model, inputs.train_rows[0], inputs.pad_id, device)
        board.hparams(inputs.config, [figures for figures in loop.at.history if figures["kept"]][-1])
    return [Epoch(**figures) for figures in loop.at.history]  # type: ignore[arg-type]


class _Loop:
    """A run under way: what `fit` goes through, a part at a time."""

    def __init__(
        self,
        model: Classifier,
        inputs: FitInputs,
        device: torch.device,
        checkpoints: Checkpoints,
        hooks: Hooks,
    ) -> None:
        self.inputs, self.config, self.device = inputs, inputs.config, device
        self.checkpoints, self.hooks = checkpoints, hooks
        self.lengths = [len(row) for row in inputs.train_rows]
        self.targets = torch.from_numpy(inputs.train.targets)
        # How rows are grouped depends on the lengths alone, so every epoch has as many steps as the first.
        steps_per_epoch = len(_steps(self.lengths, self.config, epoch=0))
        self.total_steps = steps_per_epoch * self.config.epochs
        optimizer = build_optimizer(model, self.config)
        self.run = RunState(model, optimizer, build_scheduler(optimizer, self.config, steps_per_epoch), Progress())
        checkpoints.restore(self.run)
        self.at = self.run.progress
        hooks.on_resume(self.at)
        self.loss_of = loss_function(self.config, inputs.train.targets).to(device)
        # The weights stay float32; what is computed is bfloat16 where that is as good and faster.
        half = half_precision(device, self.config.precision)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)

    def look_up(self, loss: float | None = None, samples_per_second: float | None = None) -> None:
        """Between steps and between batches of a validation: whether to go on."""
        try:
            self.hooks.on_step(self.at.step, self.total_steps, loss, samples_per_second)
        except StopRequested:
            self.checkpoints.save(self.run)
            raise

    def train(self, board: TensorBoardWriter, started: float) -> None:
        """The rest of an epoch's steps; `started` by `time.monotonic`."""
        at, trained = self.at, 0
        self.run.model.train()
        for batches in _steps(self.lengths, self.config, at.epoch)[at.batch :]:
            rows = sum(map(len, batches))
            value = self._backward(batches, rows)
            if self.config.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.run.model.parameters(), self.config.max_grad_norm)
            at.learning_rate = self.run.optimizer.param_groups[0]["lr"]
            self.run.optimizer.step()
            self.run.optimizer.zero_grad(set_to_none=True)
            self.run.scheduler.step()
            at.loss_sum += value * rows
            at.batch += 1
            at.step += 1
            trained += rows
            board.step(at.step, value, at.learning_rate)
            failpoint.passing("stepped")
            self.look_up(value, trained / (time.monotonic() - started))

    def _backward(self, batches: list[list[int]], rows_of_step: int) -> float:
        """The gradient of one step and its loss, the mean over the step's rows."""
        value = 0.0
        for index in (piece for batch in batches for piece in _pieces(batch, self.lengths, self.config, self.device)):
            ids, mask = pad([self.inputs.train_rows[i] for i in index], self.inputs.pad_id)
            with self.autocast:
                logits = self.run.model(ids.to(self.device), mask.to(self.device))
            # Each row weighs the same, in whichever of the step's batches it stands.
            loss = self.loss_of(logits.float(), self.targets[index].to(self.device)) * (len(index) / rows_of_step)
            loss.backward()
            value += loss.item()
        return value

    def validate(self, started: float) -> tuple[Epoch, Floats]:
        """The epoch's figures and what is said of the validation rows (N, K)."""
        at, inputs, config = self.at, self.inputs, self.config
        with self.autocast:
            scored = predict(
                self.run.model,
                inputs.valid_rows,
                inputs.valid.targets,
                config,
                config.valid_batch_size,
                inputs.pad_id,
                self.device,
                self.look_up,
            )
        figures = metrics(inputs.valid.targets, scored.probabilities, inputs.labels, config.task)
        failpoint.passing("validated")
        best = max(at.best_f1_macro, figures["f1_macro", ""])
        epoch = Epoch(
            at.epoch,
            at.loss_sum / len(inputs.train_rows),
            at.learning_rate,
            scored.loss,
            figures["accuracy", ""],
            figures["f1_macro", ""],
            time.monotonic() - started,
            as_good(figures["f1_macro", ""], best, len(inputs.valid)),
        )
        return epoch, scored.probabilities

    def keep(self, epoch: Epoch) -> None:
        """Weights, if they are the best so far, and a checkpoint from which the next epoch begins."""
        at = self.at
        at.best_f1_macro = max(at.best_f1_macro, epoch.valid_f1_macro)
        at.history.append(asdict(epoch))
        if epoch.kept:
            at.best = self.checkpoints.save_best(at.epoch, self.run.model)
            failpoint.passing("best")
        at.epoch, at.batch, at.loss_sum = at.epoch + 1, 0, 0.0
        self.checkpoints.save(self.run)
        failpoint.passing("checkpointed")

    def end(self) -> None:
        """Load the best weights."""
        at = self.at
        if at.epoch <= self.config.epochs:  # stopped early: no more steps are to come
            self.hooks.on_step(at.step, at.step, None, None)
        assert at.best is not None  # noqa: S101 - the first epoch is better than none
        self.run.optimizer.state.clear()  # twice the weights, and the best weights come beside the last
        self.checkpoints.load_best(at.best, self.run.model)


def _steps(lengths: list[int], config: TrainConfig, epoch: int) -> list[list[list[int]]]:
    """One epoch's optimizer steps, each a few batches of row numbers."""
    batches = shuffled_batches(lengths, config.train_batch_size, config.seed + epoch)
    together = config.gradient_accumulation_steps
    return [batches[i : i + together] for i in range(0, len(batches), together)]


def _pieces(batch: list[int], lengths: list[int], config: TrainConfig, device: torch.device) -> list[list[int]]:
    """A batch of long texts goes in pieces: the gradient is the same, the memory that of shorter ones."""
    if config.head == "guide":
        return [batch]  # BatchNorm would see smaller batches than were asked for
    return cut(batch, lengths, TOKENS_AT_ONCE.get(device.type, TOKENS_AT_ONCE["cuda"]))


def as_good(f1_macro: float, best: float, rows: int) -> bool:
    """Whether so many validation rows cannot tell an epoch's macro-F1 from the best so far: one standard error.

    Then the later epoch is kept, which has learned longer at a smaller rate. Taking the highest figure instead is
    taking what chance gave: with 120 validation rows it lost half a point of macro-F1 on rows held out.
    """
    return f1_macro >= best - sqrt(best * (1 - best) / rows)


def out_of_patience(history: Sequence[Mapping[str, float]], config: TrainConfig) -> bool:
    """Whether the best epoch lies `early_stopping_patience` epochs back."""
    if config.early_stopping_patience is None or not history:
        return False
    quality = [epoch["valid_f1_macro"] for epoch in history]
    return len(quality) - 1 - quality.index(max(quality)) >= config.early_stopping_patience


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    kind: Any = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor, "sgd": torch.optim.SGD}[
        config.optimizer
    ]
    # The fused step is one pass over the weights instead of a dozen; Adafactor has none.
    fused = {} if config.optimizer == "adafactor" else {"fused": True}
    optimizer: torch.optim.Optimizer = kind(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, **fused
    )
    return optimizer


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule that is stepped after every optimizer step. `step` is the guide's StepLR, once an epoch."""
    if config.schedule == "step":
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=steps_per_epoch, gamma=config.step_gamma)
    total = steps_per_epoch * config.epochs
    warmup = round(total * config.warmup_ratio)
    scheduler: torch.optim.lr_scheduler.LRScheduler = get_scheduler(config.schedule, optimizer, warmup, total)
    return scheduler
