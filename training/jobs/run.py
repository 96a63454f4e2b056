"""The route of a job: job -> data -> fit -> evaluate -> register.

`run_next_job` claims a job and runs it; `train` is the route, and the functions below it are its steps. The neighbours
`claiming` and `ending` handle what comes before and after it. Every write carries the fencing token of the claim.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import ceil

import torch
from structlog.contextvars import bound_contextvars
from transformers import PreTrainedTokenizerBase

from db import jobs
from db.models import TrainingJob
from db.session import Database
from training import failpoint
from training.config import TrainConfig, make_config
from training.data.dataset import Dataset, Split, read_rows, split_rows
from training.evaluation.baselines import baselines
from training.evaluation.calibration import fit_temperature
from training.evaluation.decisions import Floats
from training.evaluation.epoch import Epoch
from training.evaluation.metrics import Figures, model_figures
from training.jobs.adapt import adapt
from training.jobs.base_models import fetch_base_model
from training.jobs.claiming import claim_next_job
from training.jobs.context import TrainingContext
from training.jobs.ending import run_to_end
from training.jobs.folds import CrossValidation, cross_validate
from training.jobs.inputs import fetched_dataset
from training.jobs.lease import Lease
from training.jobs.recording import job_checkpoints, recording_hooks
from training.jobs.register import register_model
from training.jobs.unlabelled.distillation import add_soft_labelled
from training.jobs.unlabelled.rows import Setup, TrainingRows, labelled_only
from training.jobs.unlabelled.self_training import add_pseudo_labelled
from training.jobs.unregistered_artifacts import remove_unregistered_artifacts
from training.loop.checkpoints import Checkpoints
from training.loop.fit import FitInputs, Hooks, fit
from training.loop.predict import predict
from training.loop.sample_base import sample_trained, start_share
from training.model.artifact import make_reference, make_spec
from training.model.base_model import BaseModelFolder
from training.model.classifier import Classifier, build_model
from training.model.devices import pick_device
from training.reporting.training_result import TrainingResult
from training.store.paths import file_sha256
from training.text.tokenizer import TextEncoder, UnknownShare, load_tokenizer

log = logging.getLogger(__name__)


def run_next_job(database: Database, context: TrainingContext, owner: str, stopping: threading.Event) -> int | None:
    """Claim one job and run it until it ends.

    Returns its id; None when there is no job to claim, the database does not answer, or `stopping` is set meanwhile.
    """
    job = claim_next_job(database, context, owner, stopping)
    if job is None:
        return None
    with bound_contextvars(job=job.id):
        log.info("job %d: claimed by %s, start %d", job.id, job.lease_owner, job.attempts)
        failpoint.passing("claimed")
        with Lease(database, job.id, job.fencing_token, context.lease_seconds, stopping) as lease:
            state = run_to_end(database, context, job, lease, adapt if job.kind == "adapt" else train)
        if state in ("succeeded", "cancelled"):  # a failed job may be retried and then resumes from its checkpoint
            job_checkpoints(context, job).clear()
        if state in ("failed", "cancelled"):
            remove_unregistered_artifacts(database, context.model_store, job.id)
    return job.id


def train(database: Database, context: TrainingContext, job: TrainingJob, lease: Lease) -> int:
    """The route of a claimed job. Returns the id of the model version that it registers.

    Raises `LeaseLost`, `Cancelled` or `StopRequested` when this worker must stop, and any other error when the job
    cannot be completed now.
    """
    config = make_config("guide", **job.config)
    with ExitStack() as stack:
        data = read_data(context, job, config, lease)
        base = stack.enter_context(fetch_base_model(database, context, config.base_model, config.base_revision, lease))
        checkpoints = stack.enter_context(job_checkpoints(context, job))
        base = stack.enter_context(learned_sample(context, lease, base, data, config, checkpoints))
        config = config.for_rows(len(data.rows.train))
        crossed = cross_validate(context, lease, base, data.rows, config, checkpoints)
        prepared = prepare(base, data.rows, config, context.device)
        lease.check()
        hooks = recording_hooks(lease, crossed.on_step, config.task)
        rows = training_rows(database, context, job, lease, data, prepared, checkpoints, hooks)
        history = fit(
            prepared.model,
            rows.inputs,
            device=prepared.device,
            checkpoints=rows.checkpoints,
            board_folder=context.boards_folder / f"job-{job.id}",
            hooks=rows.hooks,
        )
        history = rows.settle(history)
        evaluation = evaluate(prepared, data, lease)
        rows.compare(evaluation.test_logits)
        return register(database, context, lease, prepared, data, history, evaluation, crossed)


# --- data


@dataclass(frozen=True)
class JobData:
    """The rows of a job's dataset, and the name and sha256 of its file."""

    rows: Dataset
    file_name: str
    sha256: str

    def record_report(self, lease: Lease) -> None:
        """Store the report on the dataset in the job's row."""
        report = dict(self.rows.report)
        lease.record(
            partial(jobs.record_data, job_id=lease.job_id, token=lease.token, sha256=self.sha256, report=report)
        )


def read_data(context: TrainingContext, job: TrainingJob, config: TrainConfig, lease: Lease) -> JobData:
    with fetched_dataset(job.dataset, job.dataset_sha256, context.input_store, context.read_roots) as path:
        rows = split_rows(read_rows(path), config)
        rows.report["epochs"] = config.for_rows(len(rows.train)).epochs
        data = JobData(rows, path.name, file_sha256(path))
    data.record_report(lease)
    failpoint.passing("split")
    lease.check()
    return data


# --- model


@contextmanager
def learned_sample(
    context: TrainingContext,
    lease: Lease,
    base: BaseModelFolder,
    data: JobData,
    config: TrainConfig,
    checkpoints: Checkpoints,
) -> Iterator[BaseModelFolder]:
    """Provide `base`, trained on the sample where that helps (see `sample_trained`). Its steps count as the job's."""
    suited = config.for_rows(len(data.rows.train))
    later = suited.epochs * ceil(len(data.rows.train) / suited.train_batch_size)
    steps = 0

    def on_step(step: int, total: int, loss: float | None, rate: float | None) -> None:
        nonlocal steps
        steps = total
        lease.step(step, total + later, loss, rate)

    def note(rows: int, row_passes: int) -> None:
        kept = "" if row_passes else ", by an earlier job"
        sentence = f"the base model first learned {rows:,} tweets of tweetscore's sample{kept} (`add_sample`)"
        notes = [*data.rows.report.get("notes", ()), sentence]
        data.rows.report.update(sample_rows=rows, sample_row_passes=row_passes, notes=notes)
        data.record_report(lease)

    with sample_trained(
        context.cache, base, data.rows, config, pick_device(context.device), checkpoints.of_part(0), on_step, note
    ) as trained:
        lease.steps_before = steps
        yield trained


@dataclass(frozen=True)
class Prepared:
    """A model to train on `device`, and the token ids of the rows of each part: train, valid and test."""

    base: BaseModelFolder
    tokenizer: PreTrainedTokenizerBase
    token_ids: dict[str, list[list[int]]]
    model: Classifier
    device: torch.device

    @property
    def config(self) -> TrainConfig:
        """The job's configuration with the pooling that was chosen for the base model."""
        return self.model.config

    def fit_inputs(self, rows: Dataset) -> FitInputs:
        ids, pad_id = self.token_ids, self.tokenizer.pad_token_id
        return FitInputs(
            rows.train, rows.valid, ids["train"], ids["valid"], rows.labels, self.config, pad_id, rows.scale,
            start_share=start_share(self.base, self.config),
        )  # fmt: skip


def prepare(base: BaseModelFolder, rows: Dataset, config: TrainConfig, device: str) -> Prepared:
    tokenizer = load_tokenizer(base.folder)
    encode = TextEncoder(tokenizer)
    token_ids = {
        part: encode(split.texts, config.max_length)
        for part, split in (("train", rows.train), ("valid", rows.valid), ("test", rows.test))
    }
    chosen = pick_device(device)
    return Prepared(base, tokenizer, token_ids, build_model(base, len(rows.labels), config), chosen)


# --- rows


def training_rows(
    database: Database,
    context: TrainingContext,
    job: TrainingJob,
    lease: Lease,
    data: JobData,
    prepared: Prepared,
    checkpoints: Checkpoints,
    hooks: Hooks,
) -> TrainingRows:
    """The labelled rows, and what the configuration adds to them: a teacher's probabilities, and stored tweets."""
    config, rows = prepared.config, data.rows
    setup = Setup(
        database,
        context,
        job,
        lease,
        checkpoints,
        hooks,
        rows,
        data.sha256,
        partial(data.record_report, lease),
        prepared.model,
        partial(build_model, prepared.base, len(rows.labels), config),
        prepared.device,
        prepared.tokenizer,
        prepared.fit_inputs(rows),
        prepared.token_ids["test"],
    )
    if config.teacher is not None:
        return add_soft_labelled(setup)
    return add_pseudo_labelled(setup) if config.unlabelled else labelled_only(setup)


# --- evaluate


@dataclass(frozen=True)
class Evaluation:
    """Logits (N, K) float32 of the validation and test rows, the temperature, and the figures of the test rows."""

    valid_logits: Floats
    test_logits: Floats
    temperature: float
    figures: Figures


def evaluate(prepared: Prepared, data: JobData, lease: Lease) -> Evaluation:
    rows, config = data.rows, prepared.config

    def logits(part: str, split: Split) -> Floats:
        return predict(
            prepared.model,
            prepared.token_ids[part],
            split.targets,
            config,
            config.test_batch_size,
            prepared.tokenizer.pad_token_id,
            prepared.device,
            lease.check,
        ).logits

    valid, test = logits("valid", rows.valid), logits("test", rows.test)
    temperature = fit_temperature(valid, rows.valid.targets, config.task)
    figures = model_figures(rows.test.targets, test, temperature, rows.labels, config, rows.scale)
    if config.baseline:
        baseline_figures, notes = baselines(rows, config.task, config.seed, lease.check)
        figures |= baseline_figures
        if notes:
            rows.report["notes"] = [*rows.report.get("notes", ()), *notes]
            data.record_report(lease)
    failpoint.passing("evaluated")
    lease.check()
    return Evaluation(valid, test, temperature, figures)


# --- register


def register(
    database: Database,
    context: TrainingContext,
    lease: Lease,
    prepared: Prepared,
    data: JobData,
    history: list[Epoch],
    evaluation: Evaluation,
    crossed: CrossValidation,
) -> int:
    """Store the artifact and register the model version. Returns its id."""
    spec = make_spec(
        data.rows.labels,
        prepared.config,
        prepared.base,
        prepared.tokenizer,
        evaluation.temperature,
        data.rows.scale,
    )
    result = TrainingResult(
        lease.job_id,
        lease.token,
        spec,
        data.file_name,
        data.sha256,
        data.rows,
        history,
        evaluation.figures | crossed.figures,
        evaluation.test_logits,
        crossed.out_of_fold,
        UnknownShare(prepared.tokenizer)(prepared.token_ids["test"]),
    )
    reference = make_reference(prepared.token_ids["valid"], evaluation.valid_logits)
    retry = lease.retry_while_database_away
    return register_model(database, context.model_store, prepared.model, prepared.tokenizer, reference, result, retry)
