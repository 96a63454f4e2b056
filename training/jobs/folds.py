"""Cross-validation before the model that is kept is trained: every row is predicted by a model that did not see it.

A finished fold leaves the logits of its held-out rows with the job's checkpoints, so a resumed job does not repeat it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from db import jobs
from training import failpoint
from training.config import TrainConfig
from training.data.dataset import Dataset, Split
from training.data.splits import Positions, fold_splits
from training.evaluation.calibration import fit_temperature
from training.evaluation.cross_validation import describe, fold_figures
from training.evaluation.decisions import Floats, to_probabilities
from training.evaluation.metrics import Figures, metrics
from training.jobs.context import TrainingContext
from training.jobs.lease import Lease
from training.loop.checkpoints import Checkpoints, Progress
from training.loop.fit import FitInputs, Hooks, count_steps, fit
from training.loop.predict import predict
from training.loop.sample_base import start_share
from training.model.base_model import BaseModelFolder
from training.model.classifier import build_model
from training.model.devices import pick_device
from training.reporting.training_result import OutOfFold
from training.text.tokenizer import TextEncoder, load_tokenizer

log = logging.getLogger(__name__)

# Takes (step, total steps, loss, samples per second).
OnStep = Callable[[int, int, float | None, float | None], None]


@dataclass(frozen=True)
class CrossValidation:
    """Figures and predictions of the held-out rows. `on_step` reports the steps of the training run that follows."""

    figures: Figures
    out_of_fold: OutOfFold | None
    on_step: OnStep


def cross_validate(
    context: TrainingContext,
    lease: Lease,
    base: BaseModelFolder,
    rows: Dataset,
    config: TrainConfig,
    checkpoints: Checkpoints,
) -> CrossValidation:
    """Train and measure a model for each of the job's folds, over the rows of all parts. Without `folds` do nothing.

    Raises what `Lease.step` raises; a fold that was interrupted then resumes from its checkpoint.
    """
    if config.folds is None:
        return CrossValidation({}, None, lease.step)
    run = _Folds(context, lease, base, rows, config, checkpoints)
    saved = checkpoints.results()
    results = [run.result(number, saved.get(number)) for number in range(1, config.folds + 1)]
    out_of_fold = run.collect(results)
    figures = fold_figures([run.figures(out_of_fold, split["test"]) for split in run.splits])
    log.info("job %d: %s", lease.job_id, describe(figures))
    return CrossValidation(figures, out_of_fold, run.steps.of(config.folds))


class _Steps:
    """Counts the steps of several fits as those of one run."""

    def __init__(self, lease: Lease, planned: list[int]) -> None:
        self._lease = lease
        self._of_fit = planned

    def of(self, fit: int) -> OnStep:
        def on_step(step: int, total: int, loss: float | None, rate: float | None) -> None:
            self.set(fit, total)
            self._lease.step(sum(self._of_fit[:fit]) + step, sum(self._of_fit), loss, rate)

        return on_step

    def set(self, fit: int, total: int) -> None:
        """Correct the steps of a fit, which can be fewer than planned because of early stopping."""
        self._of_fit[fit] = total

    def __getitem__(self, fit: int) -> int:
        return self._of_fit[fit]


class _Folds:
    """The rows of a cross-validation, how they are split, and the fits."""

    def __init__(
        self,
        context: TrainingContext,
        lease: Lease,
        base: BaseModelFolder,
        rows: Dataset,
        config: TrainConfig,
        checkpoints: Checkpoints,
    ) -> None:
        self._context, self._lease, self._base, self._config = context, lease, base, config
        self._checkpoints = checkpoints
        self._labels = rows.labels
        self._rows = _labelled(rows)
        self.splits = fold_splits(self._rows.targets, config)
        tokenizer = load_tokenizer(base.folder)
        encode = TextEncoder(tokenizer)
        self._pad_id: int = tokenizer.pad_token_id
        self._token_ids = encode(self._rows.texts, config.max_length)
        in_training = set(rows.train.row_numbers)
        kept = np.flatnonzero([number in in_training for number in self._rows.row_numbers])
        trained = [self._ids(index) for index in (*(split["train"] for split in self.splits), kept)]
        self.steps = _Steps(lease, [count_steps(list(map(len, ids)), config) for ids in trained])

    def result(self, number: int, saved: dict[str, NDArray[Any]] | None) -> dict[str, NDArray[Any]]:
        """Return the held-out `rows` (N,), their `logits` (N, K) and the `temperature` of fold `number`, from 1.

        `saved` is the result of an earlier start of the job.
        """
        split = self.splits[number - 1]
        if saved is not None and np.array_equal(saved["rows"], split["test"]):
            self.steps.set(number - 1, int(saved["steps"][0]))
            return saved
        with self._checkpoints.of_part(number) as checkpoints:
            arrays = self._fit(number, split, checkpoints)
            self._checkpoints.save_result(number, arrays)
            failpoint.passing("folded")
            # Raises if another worker has taken the job over: it may be resuming from the checkpoints removed next.
            self._lease.record(partial(jobs.require_token, job_id=self._lease.job_id, token=self._lease.token))
        checkpoints.clear()
        return arrays

    def _fit(self, number: int, split: Positions, checkpoints: Checkpoints) -> dict[str, NDArray[Any]]:
        device = pick_device(self._context.device)
        model = build_model(self._base, len(self._labels), self._config)
        parts = {part: self._take(index) for part, index in split.items()}
        ids = {part: self._ids(index) for part, index in split.items()}
        inputs = FitInputs(
            parts["train"], parts["valid"], ids["train"], ids["valid"], self._labels, model.config, self._pad_id,
            start_share=start_share(self._base, model.config),
        )  # fmt: skip
        history = fit(
            model,
            inputs,
            device=device,
            checkpoints=checkpoints,
            board_folder=None,
            hooks=Hooks(partial(self._log_resume, number), self.steps.of(number - 1)),
        )
        log.info("job %d: fold %d of %d, %d epochs", self._lease.job_id, number, len(self.splits), len(history))

        def logits(part: str) -> Floats:
            targets, batch_size = parts[part].targets, self._config.test_batch_size
            return predict(
                model, ids[part], targets, model.config, batch_size, self._pad_id, device, self._lease.check
            ).logits

        temperature = fit_temperature(logits("valid"), parts["valid"].targets, self._config.task)
        return {
            "rows": split["test"],
            "logits": logits("test"),
            "temperature": np.array([temperature]),
            "steps": np.array([self.steps[number - 1]]),
        }

    def _log_resume(self, number: int, progress: Progress) -> None:
        if progress.step:
            log.info("job %d: fold %d resumes from its step %d", self._lease.job_id, number, progress.step)

    def collect(self, results: list[dict[str, NDArray[Any]]]) -> OutOfFold:
        """Return the calibrated predictions of all folds in the order of the rows."""
        probabilities = np.zeros_like(self._rows.targets)
        folds = np.zeros(len(self._rows), np.int64)
        for number, result in enumerate(results, 1):
            logits, temperature = torch.from_numpy(result["logits"]), float(result["temperature"][0])
            probabilities[result["rows"]] = to_probabilities(logits, self._config.task, temperature).numpy()
            folds[result["rows"]] = number
        return OutOfFold(self._rows, probabilities, folds)

    def figures(self, predicted: OutOfFold, rows: NDArray[np.intp]) -> Figures:
        """Return the figures of the held-out rows of a fold."""
        return metrics(self._rows.targets[rows], predicted.probabilities[rows], self._labels, self._config.task)

    def _take(self, index: NDArray[np.intp]) -> Split:
        """Return rows by position."""
        rows = self._rows
        return Split([rows.texts[i] for i in index], rows.targets[index], [rows.row_numbers[i] for i in index])

    def _ids(self, index: NDArray[np.intp]) -> list[list[int]]:
        """Return the token ids of the rows of `_take`."""
        return [self._token_ids[i] for i in index]


def _labelled(data: Dataset) -> Split:
    """Return the dataset's rows of all parts in the order of the file."""
    parts = (data.train, data.valid, data.test)
    numbers = [number for part in parts for number in part.row_numbers]
    texts = [text for part in parts for text in part.texts]
    order = np.argsort(numbers)
    targets = np.concatenate([part.targets for part in parts])[order]
    return Split([texts[i] for i in order], targets, [numbers[i] for i in order])
