"""The route of a job: job -> data -> fit -> evaluate -> register. Read it from top to bottom; it has no other way.

The row is the truth: this file claims it, and everything it later writes names the fencing token of that claim.
"""

import logging
import threading
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from structlog.contextvars import bound_contextvars

from db import jobs, registry
from db.errors import LeaseLost, SchemaMismatch, TweetscoreError
from db.models import EpochMetric, TrainingJob
from db.session import Database, is_away
from training import failpoint
from training.config import make_config
from training.data.dataset import Split, read_rows, split_rows
from training.errors import Cancelled, StopRequested, StoreUnavailable
from training.evaluation.baselines import baselines
from training.evaluation.calibration import fit_temperature
from training.evaluation.decisions import Floats
from training.evaluation.epoch import Epoch
from training.evaluation.metrics import model_figures
from training.jobs import clean_stops
from training.jobs.context import TrainingContext
from training.jobs.database_retry import driver_message, retry_while_database_away
from training.jobs.inputs import fetched_base_model, fetched_dataset
from training.jobs.lease import Lease, lease_losses
from training.jobs.register import register_model
from training.jobs.unregistered_artifacts import remove_unregistered_artifacts
from training.loop.checkpoints import Checkpoints, Progress
from training.loop.fit import FitInputs, Hooks, fit
from training.loop.predict import predict
from training.model.artifact import make_reference, make_spec
from training.model.base_model import current_hub_name
from training.model.classifier import build_model
from training.model.devices import pick_device
from training.reporting.training_result import TrainingResult
from training.store.paths import file_sha256
from training.text.tokenizer import TextEncoder, load_tokenizer

log = logging.getLogger(__name__)

# For so long nobody claims a job that was given back for want of a store; twice as long each time in a row.
FIRST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 300.0


def run_next_job(database: Database, workshop: TrainingContext, owner: str, stopping: threading.Event) -> int | None:
    """Claim and work one job to its end. Returns its id, None when there was none to claim or nobody to ask."""
    try:
        clean_stops.apply_clean_stops(database, workshop.jobs_folder)
        job = _claim(database, workshop, owner, stopping)
    except StopRequested:
        return None
    except SQLAlchemyError as error:
        if not is_away(error):
            raise
        log.warning("no job can be claimed, the database does not answer: %s", driver_message(error))
        return None
    if job is None:
        return None
    with bound_contextvars(job=job.id):
        return _run(database, workshop, job, stopping)


def _claim(database: Database, workshop: TrainingContext, owner: str, stopping: threading.Event) -> TrainingJob | None:
    job: TrainingJob | None = None
    try:
        with database.begin() as session:
            job = jobs.claim(
                session, owner=owner, lease_seconds=workshop.lease_seconds, max_attempts=workshop.max_attempts
            )
            if job is not None:
                session.expunge(job)
        return job
    except SQLAlchemyError as error:
        if job is None or not is_away(error):
            raise
    # The answer to the commit was lost. A claim that was made and that nobody knows of would count as a death.
    claimed = job
    try:
        with_row = retry_while_database_away(lambda: _holds(database, claimed), stopping)
    except StopRequested:
        clean_stops.record_clean_stop(workshop.jobs_folder, claimed)
        raise
    return claimed if with_row else None


def _holds(database: Database, job: TrainingJob) -> bool:
    with database.begin() as session:
        return jobs.holds(session, job.id, job.fencing_token)


def _run(database: Database, workshop: TrainingContext, job: TrainingJob, stopping: threading.Event) -> int:
    log.info("job %d: claimed by %s, start %d", job.id, job.lease_owner, job.attempts)
    failpoint.passing("claimed")
    with Lease(database, job.id, job.fencing_token, workshop.lease_seconds, stopping) as lease:
        try:
            ended = _work_to_its_end(database, workshop, job, lease)
        except StopRequested:
            ended = None
            _stop(database, workshop, job)
    if ended is not None:
        workshop.outages.pop(job.id, None)
    if ended in ("succeeded", "cancelled"):  # one that failed may be retried, and goes on from its checkpoint
        _checkpoints(workshop, job).clear()
    if ended in ("failed", "cancelled"):
        remove_unregistered_artifacts(database, workshop.model_store, job.id)
    return job.id


def _work_to_its_end(database: Database, workshop: TrainingContext, job: TrainingJob, lease: Lease) -> str | None:
    """The state the job ended in, None where it goes on later or elsewhere. Raises `StopRequested`."""
    try:
        with ExitStack() as at_hand:
            version = _work(database, workshop, job, lease, at_hand)
        log.info("job %d: succeeded, model %d", job.id, version)
        return "succeeded"
    except StopRequested:
        raise
    except LeaseLost as error:
        lease_losses.inc()
        log.warning("%s", error)
        if lease.outage_since_renewal.is_set():  # it lapsed since no renewal could be written, and this worker is alive
            _give_back(database, job, lease)
    except SchemaMismatch as error:
        # An upgrade that this release cannot work with: nothing may be written, and this start was no death.
        clean_stops.record_clean_stop(workshop.jobs_folder, job)
        log.warning("job %d: left to its lease: %s", job.id, error)
    except Cancelled:
        return _finish(database, lease, "cancelled", None)
    except Exception as error:
        if isinstance(error, StoreUnavailable) or is_away(error):
            _wait_outside(database, workshop, job, lease, error)
            return None
        if not isinstance(error, TweetscoreError):
            log.exception("job %d failed", job.id)
        says = str(error) if isinstance(error, TweetscoreError) else f"{type(error).__name__}: {error}"
        return _finish(database, lease, "failed", says)
    return None


def _wait_outside(
    database: Database, workshop: TrainingContext, job: TrainingJob, lease: Lease, error: Exception
) -> None:
    """Give a job back for want of a store: other jobs may need none, and this one is not claimed for a while."""
    workshop.outages[job.id] += 1
    pause = min(FIRST_PAUSE_SECONDS * 2.0 ** (workshop.outages[job.id] - 1), LONGEST_PAUSE_SECONDS)
    log.warning("job %d: goes back to the queue for %g s: %s", job.id, pause, error)
    says = str(error) if isinstance(error, StoreUnavailable) else "the database did not answer"
    _give_back(database, job, lease, f"waiting: {says}", pause)


def _give_back(
    database: Database, job: TrainingJob, lease: Lease, says: str | None = None, pause_seconds: float | None = None
) -> None:
    """Take this start off the count, and queue the job again unless another worker has it by now."""
    sent = False

    def once() -> None:
        nonlocal sent
        with database.begin() as session:
            token, started_at = job.fencing_token, job.started_at
            # After a commit whose answer was lost the other worker's row may be without this start already.
            clean_stops.release_job(session, job.id, token, started_at, says, pause_seconds, uncount_start=not sent)
            sent = True

    lease.retry_while_database_away(once)


def _stop(database: Database, workshop: TrainingContext, job: TrainingJob) -> None:
    """This worker must end: give the job back, or leave word that it ended in order."""
    left = clean_stops.record_clean_stop(workshop.jobs_folder, job)
    try:
        if clean_stops.apply_clean_stop(database, left):
            log.info("job %d: given back to the queue at its checkpoint", job.id)
    except SQLAlchemyError as error:
        if not is_away(error):
            raise
        log.warning("job %d: to be given back by the next worker here, the database does not answer", job.id)
    except OSError as error:
        log.warning("job %d: left to its lease: %s", job.id, error)


def _work(database: Database, workshop: TrainingContext, job: TrainingJob, lease: Lease, at_hand: ExitStack) -> int:
    config = make_config("guide", **job.config)

    store, roots = workshop.input_store, workshop.read_roots
    with fetched_dataset(job.dataset, job.dataset_sha256, store, roots) as dataset:
        data, sha256 = split_rows(read_rows(dataset), config), file_sha256(dataset)
    record_data = partial(jobs.record_data, job_id=job.id, token=lease.token, sha256=sha256)
    lease.record(partial(record_data, report=dict(data.report)))
    failpoint.passing("split")
    lease.check()

    pinned = lease.retry_while_database_away(lambda: _pinned(database, config.base_model))
    encoder = at_hand.enter_context(fetched_base_model(config.base_model, config.base_revision or pinned, store, roots))
    tokenizer = load_tokenizer(encoder.folder)
    encode = TextEncoder(tokenizer)
    rows = {
        part: encode(split.texts, config.max_length)
        for part, split in (("train", data.train), ("valid", data.valid), ("test", data.test))
    }
    device = pick_device(workshop.device)
    model = build_model(encoder, len(data.labels), config)
    config = model.config  # its pooling settled for this encoder
    lease.check()

    inputs = FitInputs(
        data.train, data.valid, rows["train"], rows["valid"], data.labels, config, tokenizer.pad_token_id
    )
    history = fit(
        model,
        inputs,
        device=device,
        checkpoints=at_hand.enter_context(_checkpoints(workshop, job)),
        board_folder=workshop.boards_folder / f"job-{job.id}",
        hooks=_hooks(lease),
    )

    def logits(part: str, split: Split) -> Floats:
        batch_size, pad_id = config.test_batch_size, tokenizer.pad_token_id
        return predict(model, rows[part], split.targets, config, batch_size, pad_id, device, lease.check).logits

    valid, tested = logits("valid", data.valid), logits("test", data.test)
    temperature = fit_temperature(valid, data.valid.targets, config.task)
    figures = model_figures(data.test.targets, tested, temperature, data.labels, config)
    if config.baseline:
        beside, notes = baselines(data, config.task, config.seed, lease.check)
        figures |= beside
        if notes:
            data.report["notes"] = notes
            lease.record(partial(record_data, report=dict(data.report)))
    failpoint.passing("evaluated")
    lease.check()

    spec = make_spec(data.labels, config, encoder, tokenizer, temperature)
    reference = make_reference(rows["valid"], valid)
    result = TrainingResult(job.id, lease.token, spec, dataset.name, sha256, data, history, figures, tested)
    return register_model(
        database, workshop.model_store, model, tokenizer, reference, result, lease.retry_while_database_away
    )


def _pinned(database: Database, base_model: str) -> str | None:
    with database.read() as session:
        return registry.revision_used(session, current_hub_name(base_model))


def _checkpoints(workshop: TrainingContext, job: TrainingJob) -> Checkpoints:
    return Checkpoints(workshop.jobs_folder / str(job.id), job.fencing_token, workshop.checkpoint_store)


def _hooks(lease: Lease) -> Hooks:
    def on_resume(progress: Progress) -> None:
        if progress.step:
            log.info("job %d: goes on from step %d", lease.job_id, progress.step)
        last, history = progress.epoch - 1, list(progress.history)

        def resume(session: Session) -> None:
            jobs.hold(session, lease.job_id, lease.token)
            jobs.forget_epochs_after(session, lease.job_id, last)
            for figures in history:
                session.merge(EpochMetric(job_id=lease.job_id, **figures))

        lease.record(resume)

    def on_epoch(epoch: Epoch) -> None:
        log.info(
            "job %d: Epoch: %d, Loss: %.4f, lr: %.3g, Validation Accuracy = %.4f",
            lease.job_id,
            epoch.epoch,
            epoch.train_loss,
            epoch.learning_rate,
            epoch.valid_accuracy,
        )
        lease.record(
            lambda session: jobs.record_epoch(session, lease.token, EpochMetric(job_id=lease.job_id, **asdict(epoch)))
        )
        failpoint.passing("recorded")

    return Hooks(on_resume, lease.step, on_epoch)


def _finish(database: Database, lease: Lease, state: str, error: str | None) -> str | None:
    """Returns the state the job is in now, None when it is somebody else's by now. Raises `StopRequested`."""

    def once() -> None:
        with database.begin() as session:
            jobs.finish(session, lease.job_id, lease.token, state, error)

    try:
        lease.retry_while_database_away(once)
    except LeaseLost as lost:
        if not lease.retry_while_database_away(
            lambda: _is_in(database, lease, state)
        ):  # else the answer to the commit was lost
            lease_losses.inc()
            log.warning("%s", lost)
            return None
    # Why it failed stands in its row alone: an error may quote the dataset.
    hint = f"; `tweetscore jobs show {lease.job_id}` says why" if error else ""
    log.info("job %d: %s%s", lease.job_id, state, hint)
    return state


def _is_in(database: Database, lease: Lease, state: str) -> bool:
    with database.read() as session:
        job = jobs.get(session, lease.job_id)
        return (job.state, job.fencing_token) == (state, lease.token)
