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
from training.batches import cut, pad, shuffled_batches
from training.board import Board
from training.checkpoint import Checkpoints, Epoch, Progress, RunState
from training.config import TrainConfig
from training.data import Split
from training.errors import StopRequested
from training.evaluate import loss_function, metrics, predict
from training.model import Classifier, half_precision

# Of one forward and backward, padding included: a CPU gains nothing from more, a GPU is full.
TOKENS_AT_ONCE = {"cpu": 512, "cuda": 16_384}


@dataclass(frozen=True)
class Hooks:
    """Called after every step (step, total steps, loss, samples a second) and epoch. `on_step` may raise to stop."""

    on_resume: Callable[[Progress], None] = lambda progress: None
    on_step: Callable[[int, int, float | None, float | None], None] = lambda step, total, loss, rate: None
    on_epoch: Callable[[Epoch], None] = lambda epoch: None


def fit(
    model: Classifier,
    train: Split,
    valid: Split,
    train_rows: list[list[int]],
    valid_rows: list[list[int]],
    labels: list[str],
    config: TrainConfig,
    *,
    pad_id: int,
    device: torch.device,
    checkpoints: Checkpoints,
    board_folder: Path,
    hooks: Hooks,
) -> list[Epoch]:
    """Train, keeping the best epoch's weights (the guide keeps the last; see `as_good`). Returns every epoch's figures.

    Goes on from the newest checkpoint when there is one, to the same result as an unbroken run: the order of the
    batches follows from seed and epoch, everything else is in the checkpoint. A `StopRequested` raised by a hook leaves
    a checkpoint behind.
    """
    torch.manual_seed(config.seed)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    model.to(device)
    targets = torch.from_numpy(train.targets)
    lengths = [len(row) for row in train_rows]
    # How rows are grouped depends on the lengths alone, so every epoch has as many steps as the first.
    steps_per_epoch = len(_steps(lengths, config, device, epoch=0))
    total_steps = steps_per_epoch * config.epochs
    optimizer = build_optimizer(model, config)
    run = RunState(model, optimizer, build_scheduler(optimizer, config, steps_per_epoch), Progress())
    checkpoints.restore(run)
    at = run.progress
    hooks.on_resume(at)
    loss_of = loss_function(config, train.targets).to(device)
    # The weights stay float32; what a forward and a backward compute is bfloat16 where that is as good and faster.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=half_precision(device, config.precision))

    def look_up(loss: float | None = None, samples_per_second: float | None = None) -> None:
        try:
            hooks.on_step(at.step, total_steps, loss, samples_per_second)
        except StopRequested:
            checkpoints.save(run)
            raise

    with Board(board_folder, at.step) as board:
        look_up()
        while at.epoch <= config.epochs and not out_of_patience(at.history, config):
            started, trained = time.monotonic(), 0
            model.train()
            for batches in _steps(lengths, config, device, at.epoch)[at.batch :]:
                rows_of_step = sum(map(len, batches))
                value = 0.0
                for index in batches:
                    ids, mask = pad([train_rows[i] for i in index], pad_id)
                    with autocast:
                        logits = model(ids.to(device), mask.to(device))
                    # Each row weighs the same, in whichever of the step's batches it stands.
                    loss = loss_of(logits.float(), targets[index].to(device)) * (len(index) / rows_of_step)
                    loss.backward()
                    value += loss.item()
                if config.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                at.learning_rate = optimizer.param_groups[0]["lr"]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                run.scheduler.step()
                at.loss_sum += value * rows_of_step
                at.batch += 1
                at.step += 1
                trained += rows_of_step
                board.step(at.step, value, at.learning_rate)
                failpoint.passing("stepped")
                look_up(value, trained / (time.monotonic() - started))

            with autocast:
                scored = predict(
                    model, valid_rows, valid.targets, config, config.valid_batch_size, pad_id, device, look_up
                )
            figures = metrics(valid.targets, scored.probabilities, labels, config.task)
            failpoint.passing("validated")
            at.best_f1_macro = max(at.best_f1_macro, figures["f1_macro", ""])
            epoch = Epoch(
                at.epoch,
                at.loss_sum / len(train_rows),
                at.learning_rate,
                scored.loss,
                figures["accuracy", ""],
                figures["f1_macro", ""],
                time.monotonic() - started,
                as_good(figures["f1_macro", ""], at.best_f1_macro, len(valid)),
            )
            at.history.append(asdict(epoch))
            if epoch.kept:
                at.best = checkpoints.save_best(at.epoch, model)
                failpoint.passing("best")
            at.epoch, at.batch, at.loss_sum = at.epoch + 1, 0, 0.0
            checkpoints.save(run)
            failpoint.passing("checkpointed")
            shown = {
                "epoch loss": epoch.train_loss,
                "validation loss": epoch.valid_loss,
                "validation accuracy": epoch.valid_accuracy,
                "validation f1 macro": epoch.valid_f1_macro,
            }
            board.epoch(at.step, shown, valid, scored.probabilities, labels, config.task)
            hooks.on_epoch(epoch)
        if at.epoch <= config.epochs:  # stopped early: no more steps are to come
            hooks.on_step(at.step, at.step, None, None)
        assert at.best is not None  # noqa: S101 - the first epoch is better than none
        optimizer.state.clear()  # twice the weights, and the best weights come beside the last
        checkpoints.load_best(at.best, model)
        model.eval()
        board.graph(model, train_rows[0], pad_id, device)
        board.hparams(config, [figures for figures in at.history if figures["kept"]][-1])
    return [Epoch(**figures) for figures in at.history]  # type: ignore[arg-type]


def _steps(lengths: list[int], config: TrainConfig, device: torch.device, epoch: int) -> list[list[list[int]]]:
    """One epoch's optimizer steps, each a few batches of row numbers."""
    batches = shuffled_batches(lengths, config.train_batch_size, config.seed + epoch)
    together = config.gradient_accumulation_steps
    steps = [batches[i : i + together] for i in range(0, len(batches), together)]
    if config.head == "guide":
        return steps  # BatchNorm would see smaller batches than were asked for
    # A batch of long texts goes in pieces: the gradient is the same, the memory that of shorter ones.
    budget = TOKENS_AT_ONCE.get(device.type, TOKENS_AT_ONCE["cuda"])
    return [[piece for batch in step for piece in cut(batch, lengths, budget)] for step in steps]


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
