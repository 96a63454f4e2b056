"""Self-training: a model learns from the labelled rows, predicts stored tweets, and a second one learns from both.

1. Fit a model on the labelled rows, with checkpoints of its own in JOB/.labelled-only.
2. Predict the tweets with the mean of several passes with dropout, and choose certain ones of each label.
3. Fit a new model on labelled rows and chosen tweets. Keep it unless the first is better on the validation rows.

After Mukherjee and Awadallah (2020), "Uncertainty-aware Self-training for Few-shot Text Classification".
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from training.evaluation.calibration import fit_temperature
from training.evaluation.decisions import Floats, to_probabilities
from training.evaluation.epoch import Epoch
from training.jobs.unlabelled.labels import kept_labels
from training.jobs.unlabelled.rows import Setup, TrainingRows, labelled_only, one_stage, stored_tweets, with_rows
from training.loop.checkpoints import Checkpoints
from training.loop.fit import Hooks, as_good, fit
from training.loop.logits import logits_of
from training.loop.pseudo_labels import choose_rows, row_weights
from training.model.classifier import Classifier

PASSES = 5
# Hidden, so that the mirror of the job's checkpoints leaves it alone.
FIRST_FOLDER = ".labelled-only"


def add_pseudo_labelled(setup: Setup) -> TrainingRows:
    """Run the first two steps and return the rows of the third."""
    texts = stored_tweets(setup)
    if not texts:
        return labelled_only(setup)
    ids = setup.tokenise(texts)
    first = _FirstModel(setup, len(texts))
    history, probabilities = first.predict(texts, ids)
    chosen = choose_rows(probabilities, setup.config.pseudo_threshold, setup.rows.train.targets.mean(axis=0))
    weights = row_weights(probabilities[chosen], len(setup.rows.train), setup.config.unlabelled_weight)
    _report(setup, probabilities, chosen, weights)
    if not len(chosen):
        done = first.steps(history) + first.passes_steps
        hooks = first.recorded_hooks(lambda: setup.lease.step(done, done, None))
        # `fit` finds the first model's checkpoints complete and loads it.
        return TrainingRows(setup.inputs, first.checkpoints, hooks)
    targets = np.eye(probabilities.shape[1], dtype=np.float32)[probabilities[chosen].argmax(axis=1)]
    inputs = with_rows(setup.inputs, [texts[i] for i in chosen], [ids[i] for i in chosen], targets, weights)
    hooks = one_stage(setup.hooks, first.steps(history) + first.passes_steps, 0)
    return TrainingRows(inputs, setup.checkpoints, hooks, lambda second: first.settle(history, second))


class _FirstModel:
    """The model that learns from the labelled rows only, and predicts `tweets` tweets."""

    def __init__(self, setup: Setup, tweets: int) -> None:
        self._setup = setup
        checkpoints = setup.checkpoints
        self.checkpoints = Checkpoints(checkpoints.folder / FIRST_FOLDER, checkpoints.writer)
        self.passes_steps = setup.steps_for(PASSES * tweets)
        self._second_steps = setup.config.epochs * setup.steps_for(len(setup.rows.train) + tweets)
        setup.rows.report["row_passes"] = setup.config.epochs * (2 * len(setup.rows.train) + tweets) + PASSES * tweets
        setup.record_report()

    def predict(self, texts: list[str], ids: list[list[int]]) -> tuple[list[Epoch], Floats]:
        """Return the epochs, and the mean probabilities (N, K) of the tweets over `PASSES` passes with dropout."""
        setup = self._setup
        model = setup.build()
        history = self.fit(model, one_stage(Hooks(on_step=setup.lease.step), 0, self.passes_steps + self._second_steps))
        temperature = self._temperature(model)
        before, total = self.steps(history), self.steps(history) + self.passes_steps + self._second_steps

        def label(start: int, stop: int) -> Floats:
            found = []
            for number in range(PASSES):
                done = before + setup.steps_for(PASSES * start + number * (stop - start))
                torch.manual_seed(setup.config.seed + PASSES * start + number)
                logits = self._logits(model, ids[start:stop], done, total)
                found.append(to_probabilities(torch.from_numpy(logits), setup.config.task, temperature).numpy())
            return np.asarray(np.mean(found, axis=0))

        return history, kept_labels(texts, setup.checkpoints, label)

    def fit(self, model: Classifier, hooks: Hooks) -> list[Epoch]:
        """Train `model` on the labelled rows. When that was done before, only load the weights."""
        setup = self._setup
        return fit(
            model,
            setup.inputs,
            device=setup.device,
            checkpoints=self.checkpoints,
            board_folder=setup.context.boards_folder / f"job-{setup.job.id}" / "labelled-only",
            hooks=hooks,
        )

    def steps(self, history: list[Epoch]) -> int:
        return len(history) * self._setup.inputs.steps_per_epoch

    def recorded_hooks(self, check: Callable[[], None]) -> Hooks:
        """Return hooks that record the epochs of this model as the job's. `check` is called instead of `on_step`."""
        return replace(self._setup.hooks, on_step=lambda step, total, loss, rate: check())

    def settle(self, first: list[Epoch], second: list[Epoch]) -> list[Epoch]:
        """Return the epochs of the better model, whose weights are in the job's model then.

        The second is kept unless its validation macro-F1 is more than one standard error below that of the first.
        """
        before, after = (_kept(history).valid_f1_macro for history in (first, second))
        keep = as_good(after, before, len(self._setup.rows.valid))
        self._setup.rows.report["unlabelled"] |= {
            "valid_f1_macro": {"labelled_only": before, "with_tweets": after},
            "kept": "with_tweets" if keep else "labelled_only",
        }
        self._setup.note(
            f"validation macro-F1 was {before:.4f} with the labelled rows alone and {after:.4f} with stored tweets; "
            f"{'the second model was kept' if keep else 'the first model was kept, since the second is worse'}"
        )
        if keep:
            return second
        # `fit` must begin with the weights of the base model, which it averages with the trained ones.
        self._setup.model.load_state_dict(self._setup.build().state_dict())
        return self.fit(self._setup.model, self.recorded_hooks(self._setup.lease.check))

    def _temperature(self, model: Classifier) -> float:
        inputs, setup = self._setup.inputs, self._setup
        logits = logits_of(model, inputs.valid_rows, inputs.pad_id, setup.device, between_batches=setup.lease.check)
        return fit_temperature(logits, inputs.valid.targets, setup.config.task)

    def _logits(self, model: Classifier, rows: list[list[int]], done: int, total: int) -> Floats:
        setup = self._setup
        return logits_of(
            model,
            rows,
            setup.inputs.pad_id,
            setup.device,
            precision=setup.config.precision,
            dropout=True,
            between_batches=lambda: setup.lease.step(done, total, None),
        )


def _kept(history: list[Epoch]) -> Epoch:
    return next(epoch for epoch in reversed(history) if epoch.kept)


def _report(setup: Setup, probabilities: Floats, chosen: NDArray[np.intp], weights: Floats) -> None:
    """Describe the predictions of the tweets and those that were chosen in the job's report."""
    threshold, report = setup.config.pseudo_threshold, setup.rows.report
    used = np.bincount(probabilities[chosen].argmax(axis=1), minlength=probabilities.shape[1])
    by_label = dict(zip(setup.rows.labels, map(int, used), strict=True))
    certain, total = int((probabilities.max(axis=1) >= threshold).sum()), float(weights.sum())
    report["unlabelled"] |= {"certain": certain, "used": by_label, "weight": total}
    passes = setup.config.epochs * (2 * len(setup.rows.train) + len(chosen))
    report["row_passes"] = passes + PASSES * len(probabilities)
    found = f"of {len(probabilities):,} stored tweets, {certain:,} have a predicted label of {threshold:g} or more"
    if not len(chosen):
        setup.note(f"{found}, too few to choose some of each label; the model was trained without stored tweets")
        return
    listed = ", ".join(f"{label} {count:,}" for label, count in by_label.items())
    setup.note(
        f"{found}; the second model was also trained on {len(chosen):,} of them ({listed}), which count as {total:.0f} "
        "labelled rows"
    )
