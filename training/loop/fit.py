"""The training loop: takes rows of token ids and loads the best weights into the model. Uses no SQL and no queue."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from training import failpoint
from training.config import AdaptConfig, TrainConfig
from training.data.dataset import Split
from training.data.numbers import TargetScale
from training.errors import StopRequested
from training.evaluation.decisions import Floats
from training.evaluation.epoch import Epoch
from training.evaluation.epoch_quality import epoch_quality
from training.loop.checkpoints import Checkpoints, Progress, RunState
from training.loop.memory import TokenBudget, tokens_at_once
from training.loop.overlap import StepLosses, ahead, pinned
from training.loop.predict import loss_function, predict
from training.loop.soft_targets import SoftTargets
from training.model.batching import pad, shuffled_batches
from training.model.classifier import Classifier, half_precision
from training.model.kernels import training_kernels
from training.reporting.tensorboard import TensorBoardWriter


@dataclass(frozen=True)
class Hooks:
    """Callbacks of a run: when it starts or resumes, after every step, and after every epoch.

    `on_step` gets (step, total steps, loss, samples per second) and may raise to stop the run. On a GPU the loss is
    that of the step before. It is also called before the first step and between the batches of a validation, with None
    for the last two.
    """

    on_resume: Callable[[Progress], None] = lambda progress: None
    on_step: Callable[[int, int, float | None, float | None], None] = lambda step, total, loss, rate: None
    on_epoch: Callable[[Epoch], None] = lambda epoch: None


@dataclass(frozen=True)
class FitInputs:
    """The data and configuration of a run. `train_rows` and `valid_rows` are lists of token ids.

    `scale` is that of a continuous task. Only TensorBoard uses it. `soft` has a teacher's probabilities of the training
    rows. The weights that are kept are the mean of those before the run, which count `start_share`, and of the best
    epoch: after Wortsman et al. (2022), "Robust fine-tuning of zero-shot models".
    """

    train: Split
    valid: Split
    train_rows: list[list[int]]
    valid_rows: list[list[int]]
    labels: list[str]
    config: TrainConfig
    pad_id: int
    scale: TargetScale | None = None
    soft: SoftTargets | None = None
    start_share: float = 0.0

    @property
    def steps_per_epoch(self) -> int:
        # The grouping of rows depends only on their lengths, so every epoch has as many steps as the first.
        return len(_steps([len(row) for row in self.train_rows], self.config, epoch=0))


def fit(
    model: Classifier,
    inputs: FitInputs,
    *,
    device: torch.device,
    checkpoints: Checkpoints,
    board_folder: Path | None,
    hooks: Hooks,
) -> list[Epoch]:
    """Train `model` on `device` and load the best epoch's weights into it (see `as_good`; the guide keeps the last).

    Resumes from the newest checkpoint, if there is one, with the same result as an uninterrupted run: the order of the
    batches follows from seed and epoch, and the checkpoint stores everything else. When a hook raises `StopRequested`,
    a checkpoint is saved first. Without `board_folder` nothing is written to TensorBoard. Returns the figures of every
    epoch.
    """
    torch.manual_seed(inputs.config.seed)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    run = _Run(model.to(device), inputs, device, checkpoints, hooks)
    progress = run.progress
    with TensorBoardWriter(board_folder, progress.step) as board, training_kernels(model, device):
        run.report_step()
        while progress.epoch <= inputs.config.epochs and not out_of_patience(progress.history, inputs.config):
            started = time.monotonic()
            run.train_epoch(board, started)
            epoch, probabilities = run.validate(started)
            run.save(epoch)
            board.epoch(progress.step, epoch, inputs.valid, probabilities, inputs.labels, inputs.config, inputs.scale)
            hooks.on_epoch(epoch)
        run.load_best()
        model.eval()
        board.graph(model, inputs.train_rows[0], inputs.pad_id, device)
        board.hparams(inputs.config, [figures for figures in progress.history if figures["kept"]][-1])
    return [Epoch(**figures) for figures in progress.history]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Piece:
    """Rows that are computed at once: ids (B, T) and mask (B, T), and the numbers of the rows, also as (B,)."""

    rows: list[int]
    ids: torch.Tensor
    mask: torch.Tensor
    index: torch.Tensor


class _Run:
    """State and steps of one run of `fit`."""

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
        self.targets = torch.from_numpy(inputs.train.targets).to(device)
        steps_per_epoch = inputs.steps_per_epoch
        self.total_steps = steps_per_epoch * self.config.epochs
        self.model = model
        self.start = {name: value.clone() for name, value in model.state_dict().items()} if inputs.start_share else {}
        optimizer = build_optimizer(model, self.config)
        self.state = RunState(model, optimizer, build_scheduler(optimizer, self.config, steps_per_epoch), Progress())
        checkpoints.restore(self.state)
        self.progress = self.state.progress
        hooks.on_resume(self.progress)
        weights = inputs.train.weights
        self.weights = None if weights is None else torch.from_numpy(weights).to(device)
        self.soft = None if inputs.soft is None else inputs.soft.to(device)
        self.losses = StepLosses(device)
        self.budget = TokenBudget(
            device,
            self.lengths,
            tokens_at_once(device),
            divisible=self.config.head != "guide",  # BatchNorm would see batches smaller than `train_batch_size`
            lowered_to=self.progress.tokens_at_once,
        )
        reduction = "mean" if weights is None and inputs.soft is None else "none"
        self.loss_of = loss_function(self.config, inputs.train.targets, reduction).to(device)
        # The weights stay float32; bfloat16 is used for computation where the hardware supports it.
        half = half_precision(device, self.config.precision)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)

    def report_step(self, loss: float | None = None, samples_per_second: float | None = None) -> None:
        """Call `on_step`, which may raise to stop the run. On `StopRequested` save a checkpoint first."""
        try:
            self.hooks.on_step(self.progress.step, self.total_steps, loss, samples_per_second)
        except StopRequested:
            self.losses.read()
            self.checkpoints.save(self.state)
            raise

    def train_epoch(self, board: TensorBoardWriter, started: float) -> None:
        """Run the steps of the epoch that are not done yet. `started` is its start by `time.monotonic`."""
        progress, trained = self.progress, 0
        self.model.train()
        steps = _steps(self.lengths, self.config, progress.epoch)[progress.batch :]
        with closing(ahead(steps, self._prepare, self.device)) as prepared:
            for batches, pieces in zip(steps, prepared, strict=True):
                rows = sum(map(len, batches))
                losses = self._backward(batches, pieces, rows)
                update(self.state, self.config)
                trained += rows
                note = partial(self._note, board, progress.step, rows, progress.learning_rate)
                value = self.losses.add(losses, note)
                failpoint.passing("stepped")
                self.report_step(value, trained / (time.monotonic() - started))
        self.losses.read()

    def _prepare(self, batches: list[list[int]]) -> list[Piece]:
        return [self._piece(rows) for rows in self.budget.cut(batches)]

    def _piece(self, rows: list[int]) -> Piece:
        ids, mask = pad([self.inputs.train_rows[i] for i in rows], self.inputs.pad_id)
        index = torch.tensor(rows)
        return Piece(rows, *(pinned(tensor, self.device) for tensor in (ids, mask, index)))

    def _backward(self, batches: list[list[int]], prepared: list[Piece], rows_of_step: int) -> list[torch.Tensor]:
        """Compute the gradient of one step. Returns the parts of its loss, the mean over the step's rows."""

        def compute(cut: list[list[int]]) -> list[torch.Tensor]:
            self.state.optimizer.zero_grad(set_to_none=True)  # that of a pass that was out of memory
            # The budget may have been lowered since the pieces were prepared.
            pieces = prepared if [piece.rows for piece in prepared] == cut else map(self._piece, cut)
            return [self._backward_piece(piece, rows_of_step) for piece in pieces]

        losses = self.budget.run(batches, compute)
        self.progress.tokens_at_once = self.budget.lowered_to
        return losses

    def _backward_piece(self, piece: Piece, rows_of_step: int) -> torch.Tensor:
        """Add the gradient of a piece. Returns its part of the step's loss."""
        ids, mask, index = (part.to(self.device, non_blocking=True) for part in (piece.ids, piece.mask, piece.index))
        with self.autocast:
            logits = self.model(ids, mask)
        # A row counts the same in small and in large batches.
        loss = self._loss(logits.float(), index) * (len(index) / rows_of_step)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of the rows `index` (B,), each multiplied by its weight. `logits` (B, K)."""
        loss: torch.Tensor = self.loss_of(logits, self.targets[index])
        if self.soft is not None:
            loss = self.soft.mix(loss, logits, index, self.loss_of)
        if self.weights is not None:
            loss = loss.reshape(len(index), -1).mean(1) * self.weights[index]
        return loss.mean()

    def _note(self, board: TensorBoardWriter, step: int, rows: int, learning_rate: float, loss: float) -> None:
        """Count the loss of a step when it is read."""
        self.progress.loss_sum += loss * rows
        board.step(step, loss, learning_rate)

    def validate(self, started: float) -> tuple[Epoch, Floats]:
        """Return the epoch's figures and the probabilities (N, K) of the validation rows."""
        progress, inputs, config = self.progress, self.inputs, self.config
        with self.autocast:
            scored = predict(
                self.model,
                inputs.valid_rows,
                inputs.valid.targets,
                config,
                config.valid_batch_size,
                inputs.pad_id,
                self.device,
                self.report_step,
            )
        accuracy, f1_macro = epoch_quality(inputs.valid.targets, scored.probabilities, config.task)
        failpoint.passing("validated")
        best = max(progress.best_f1_macro, f1_macro)
        epoch = Epoch(
            progress.epoch,
            progress.loss_sum / len(inputs.train_rows),
            progress.learning_rate,
            scored.loss,
            accuracy,
            f1_macro,
            time.monotonic() - started,
            f1_macro >= best if config.task == "continuous" else as_good(f1_macro, best, len(inputs.valid)),
        )
        return epoch, scored.probabilities

    def save(self, epoch: Epoch) -> None:
        """Save the weights if they are kept, and a checkpoint from which the next epoch begins."""
        progress = self.progress
        progress.best_f1_macro = max(progress.best_f1_macro, epoch.valid_f1_macro)
        progress.history.append(asdict(epoch))
        if epoch.kept:
            progress.best = self.checkpoints.save_best(progress.epoch, self.model)
            failpoint.passing("best")
        progress.epoch, progress.batch, progress.loss_sum = progress.epoch + 1, 0, 0.0
        self.checkpoints.save(self.state)
        failpoint.passing("checkpointed")

    def load_best(self) -> None:
        """Load the best weights. After early stopping, first report that no more steps follow."""
        progress = self.progress
        if progress.epoch <= self.config.epochs:
            self.hooks.on_step(progress.step, progress.step, None, None)
        assert progress.best is not None  # noqa: S101 - the first epoch is always kept
        # Free the optimizer's state, twice the size of the weights: while loading, two sets of weights are in memory.
        self.state.optimizer.state.clear()
        self.checkpoints.load_best(progress.best, self.model)
        for name, value in self.model.state_dict().items():
            if name in self.start and value.is_floating_point():
                value.lerp_(self.start[name], self.inputs.start_share)


def update(state: RunState, config: TrainConfig | AdaptConfig) -> None:
    """Make an optimizer step with the gradient."""
    progress, optimizer = state.progress, state.optimizer
    if config.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(state.model.parameters(), config.max_grad_norm)
    progress.learning_rate = optimizer.param_groups[0]["lr"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state.scheduler.step()
    progress.batch += 1
    progress.step += 1


def count_steps(lengths: list[int], config: TrainConfig) -> int:
    """Return the optimizer steps of a run over training rows of these lengths, unless it stops early."""
    return len(_steps(lengths, config, epoch=0)) * config.epochs


def _steps(lengths: list[int], config: TrainConfig, epoch: int) -> list[list[list[int]]]:
    """Return an epoch's optimizer steps: each is a list of batches, and each batch a list of row numbers."""
    batches = shuffled_batches(lengths, config.train_batch_size, config.seed + epoch)
    per_step = config.gradient_accumulation_steps
    return [batches[i : i + per_step] for i in range(0, len(batches), per_step)]


def as_good(f1_macro: float, best: float, rows: int) -> bool:
    """Return whether an epoch's macro-F1 is within one standard error of the best, given the number of validation rows.

    The later of such epochs is kept: it was trained longer and with a smaller learning rate. The highest macro-F1 is
    partly chance: with 120 validation rows, keeping it lost half a point of macro-F1 on held-out rows.
    """
    return f1_macro >= best - sqrt(best * (1 - best) / rows)


def out_of_patience(history: Sequence[Mapping[str, float]], config: TrainConfig) -> bool:
    """Return whether the best epoch was `early_stopping_patience` epochs ago."""
    if config.early_stopping_patience is None or not history:
        return False
    quality = [epoch["valid_f1_macro"] for epoch in history]
    return len(quality) - 1 - quality.index(max(quality)) >= config.early_stopping_patience


def build_optimizer(model: nn.Module, config: TrainConfig | AdaptConfig) -> torch.optim.Optimizer:
    kind: Any = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor, "sgd": torch.optim.SGD}[
        config.optimizer
    ]
    # A fused step makes one pass over the weights instead of a dozen. Adafactor has no fused step.
    fused = {} if config.optimizer == "adafactor" else {"fused": True}
    optimizer: torch.optim.Optimizer = kind(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, **fused
    )
    return optimizer


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig | AdaptConfig, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a schedule that is stepped after every optimizer step. `step` is the guide's StepLR, once an epoch."""
    if config.schedule == "step":
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=steps_per_epoch, gamma=config.step_gamma)
    total = steps_per_epoch * config.epochs
    warmup = round(total * config.warmup_ratio)
    scheduler: torch.optim.lr_scheduler.LRScheduler = get_scheduler(config.schedule, optimizer, warmup, total)
    return scheduler
