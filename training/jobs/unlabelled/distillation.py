"""Distillation: the job's model, the student, learns from the probabilities of another one, its teacher.

The teacher is in memory only while it labels rows, and again when both are compared on the test rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from db import jobs, registry
from db.models import ModelVersion
from training.errors import BadConfig
from training.evaluation.decisions import Choices, Floats, choose, to_probabilities
from training.evaluation.metrics import metrics
from training.jobs.unlabelled.labels import kept_labels
from training.jobs.unlabelled.rows import Setup, TrainingRows, one_stage, stored_tweets, with_rows
from training.jobs.unlabelled.teacher import find_teacher
from training.loop.logits import logits_of
from training.loop.soft_targets import SoftTargets
from training.loop.speed import Timed, rows_per_second
from training.model.artifact import Artifact, load_artifact
from training.model.classifier import Classifier
from training.reporting.distillation import Distillation, Figures
from training.text.cleaning import clean
from training.text.tokenizer import TextEncoder


def add_soft_labelled(setup: Setup) -> TrainingRows:
    """Let the teacher label the training rows and the stored tweets; return both with its probabilities."""
    config, train = setup.config, setup.rows.train
    teacher = find(setup)
    tweets = stored_tweets(setup) if config.unlabelled else []
    texts = teacher.cleaned([*train.texts, *tweets])
    setup.rows.report["row_passes"] = (1 + config.epochs) * len(texts)
    setup.record_report()
    logits = teacher.label(texts)

    def probabilities(temperature: float) -> Floats:
        found: Floats = to_probabilities(torch.from_numpy(logits), config.task, temperature).numpy()
        return found

    # The targets of tweets only count in the weights of labels: their loss is the teacher's part alone.
    weights = np.full(len(tweets), config.unlabelled_weight, np.float32)
    targets = probabilities(1.0)[len(train) :]
    inputs = with_rows(setup.inputs, tweets, setup.tokenise(tweets), targets, weights)
    shares = np.ones(len(texts), np.float32)
    shares[: len(train)] = config.teacher_share
    of_teacher = torch.from_numpy(probabilities(config.soft_temperature))
    soft = SoftTargets(of_teacher, torch.from_numpy(shares), config.soft_temperature)
    hooks = one_stage(setup.hooks, setup.steps_for(len(texts)), 0)
    return TrainingRows(replace(inputs, soft=soft), setup.checkpoints, hooks, compare=teacher.compare)


def find(setup: Setup) -> "Teacher":
    """Return the teacher that the job's configuration names. Raises `NotFound` and `BadConfig`, see `find_teacher`."""
    version_id = setup.config.teacher
    assert version_id is not None  # noqa: S101 - the caller's condition
    numbers = set(setup.rows.test.row_numbers)

    def read() -> Teacher:
        with setup.database.read() as session:
            version = find_teacher(session, version_id, setup.rows.labels)
            job = jobs.find(session, version.job_id) if version.job_id is not None else None
            same_file = job is not None and job.dataset_sha256 == setup.sha256
            return Teacher(setup, version, same_file and registry.tested_rows(session, version_id) == numbers)

    return setup.lease.retry_while_database_away(read)


@dataclass(frozen=True)
class Teacher:
    """A model version that labels the rows of a job; labels are in the order of the job's dataset.

    `same_test_rows`: it was tested on the test rows of the job, so it was not trained on them.
    """

    setup: Setup
    version: ModelVersion
    same_test_rows: bool

    def cleaned(self, texts: Sequence[str]) -> list[str]:
        """Return texts that the student's cleaner has cleaned as the teacher reads them."""
        version = self.version.cleaner_version
        return list(texts) if version == self.setup.config.cleaner else [clean(text, version) for text in texts]

    def label(self, texts: list[str]) -> Floats:
        """Return the logits (N, K) of cleaned texts. The model is not loaded when an earlier start stored them all."""
        setup, check = self.setup, self.setup.lease
        total = setup.steps_for(len(texts)) + setup.config.epochs * setup.steps_for(len(texts))
        with ExitStack() as held:
            loaded: list[Artifact] = []

            def label_chunk(start: int, stop: int) -> Floats:
                if not loaded:
                    loaded.append(held.enter_context(self._opened()))
                rows = _tokenise(loaded[0], texts[start:stop])
                done, precision = setup.steps_for(start), setup.config.precision
                return self._logits(loaded[0], rows, lambda: check.step(done, total, None), precision)

            return kept_labels(texts, setup.checkpoints, label_chunk)

    def compare(self, student_logits: Floats) -> None:
        """Put a table of teacher and student into the job's report. `student_logits` (N, K) of the test rows."""
        setup, test = self.setup, self.setup.rows.test
        with self._opened() as artifact:
            rows = _tokenise(artifact, self.cleaned(test.texts))
            teacher_logits = self._logits(artifact, rows, setup.lease.check, "float32")
            models = {
                "teacher": Timed(artifact.model, rows, artifact.tokenizer.pad_token_id),
                "student": Timed(setup.model, setup.test_rows, setup.inputs.pad_id),
            }
            speeds = rows_per_second(models, setup.device, setup.lease.check)
            teacher = self._figures(artifact.model, teacher_logits, speeds["teacher"])
        student = self._figures(setup.model, student_logits, speeds["student"])
        same = (self._chosen(teacher_logits) == self._chosen(student_logits)).all(axis=1)
        found = Distillation(
            self.version.id, len(test), str(setup.device), self.same_test_rows, float(same.mean()), teacher, student
        )
        setup.rows.report["distillation"] = asdict(found)
        if not self.same_test_rows:
            setup.note(
                f"teacher {self.version.id} was not tested on these test rows and may have been trained on some of "
                "them; its figures may be too good"
            )
        setup.record_report()

    @contextmanager
    def _opened(self) -> Iterator[Artifact]:
        version, task = self.version, self.setup.config.task
        with self.setup.context.model_store.fetched(version.artifact_url, version.sha256) as folder:
            artifact = load_artifact(folder, version.sha256)
            if artifact.spec.config.task != task:
                raise BadConfig(
                    f"teacher {version.id} was trained for the task {artifact.spec.config.task}, and this job is for "
                    f"{task}; name a teacher of the same task"
                )
            yield artifact

    def _logits(
        self, artifact: Artifact, rows: list[list[int]], between_batches: Callable[[], None], precision: str
    ) -> Floats:
        pad_id, device = artifact.tokenizer.pad_token_id, self.setup.device
        logits = logits_of(artifact.model, rows, pad_id, device, precision=precision, between_batches=between_batches)
        own = artifact.spec.labels
        return np.ascontiguousarray(logits[:, [own.index(label) for label in self.setup.rows.labels]])

    def _figures(self, model: Classifier, logits: Floats, rows_per_second: float) -> Figures:
        rows, task = self.setup.rows, self.setup.config.task
        measured = metrics(
            rows.test.targets, to_probabilities(torch.from_numpy(logits), task).numpy(), rows.labels, task
        )
        state = model.network.state_dict().values()
        return Figures(
            model.config.base_model,
            measured["accuracy", ""],
            measured["f1_macro", ""],
            sum(parameter.numel() for parameter in model.parameters()),
            sum(tensor.numel() * tensor.element_size() for tensor in state),
            rows_per_second,
        )

    def _chosen(self, logits: Floats) -> Choices:
        return choose(
            to_probabilities(torch.from_numpy(logits), self.setup.config.task).numpy(), self.setup.config.task
        )


def _tokenise(artifact: Artifact, texts: list[str]) -> list[list[int]]:
    return TextEncoder(artifact.tokenizer)(texts, artifact.spec.config.max_length)
