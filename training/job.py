"""The route of a job: job -> data -> fit -> evaluate -> register. Read it from top to bottom; it has no other way.

The row is the truth: this file claims it, and everything it later writes names the fencing token of that claim.
"""

import logging
import threading
from contextlib import ExitStack
from dataclasses import asdict

from sqlalchemy.exc import OperationalError
from structlog.contextvars import bound_contextvars

from db import jobs, registry
from db.errors import LeaseLost, SchemaMismatch, TweetscoreError
from db.models import EpochMetric, TrainingJob
from db.session import Database
from training import failpoint
from training.artifact import make_reference, make_spec
from training.baselines import baselines
from training.calibrate import fit_temperature
from training.checkpoint import Checkpoints, Epoch, Progress
from training.config import make_config
from training.data import Split, read_rows, split_rows
from training.decide import Floats
from training.devices import pick_device
from training.encoders import present_name
from training.errors import Cancelled, StopRequested, StoreAway, TeamBroken
from training.evaluate import model_figures, predict
from training.fit import FitInputs, Hooks
from training.inputs import dataset_at_hand, encoder_at_hand
from training.launch import fit_on
from training.lease import Lease, losses
from training.model import build_model
from training.outcome import Outcome
from training.paths import file_sha256
from training.register import register_model
from training.text import TextEncoder, load_tokenizer
from training.workshop import Workshop

log = logging.getLogger(__name__)


def run_next_job(database: Database, workshop: Workshop, owner: str, stopping: threading.Event) -> int | None:
    """Claim and work one job to its end. Returns its id, None when there was none to claim."""
    with database.begin() as session:
        job = jobs.claim(session, owner=owner, lease_seconds=workshop.lease_seconds, max_attempts=workshop.max_attempts)
    if job is None:
        return None
    with bound_contextvars(job=job.id):
        return _run(database, workshop, job, owner, stopping)


def _run(database: Database, workshop: Workshop, job: TrainingJob, owner: str, stopping: threading.Event) -> int:
    log.info("job %d: claimed by %s, start %d", job.id, owner, job.attempts)
    failpoint.passing("claimed")
    ended: str | None = None
    with Lease(database, job.id, job.fencing_token, workshop.lease_seconds, stopping) as lease:
        try:
            with ExitStack() as at_hand:
                version = _work(database, workshop, job, lease, at_hand)
            log.info("job %d: succeeded, model %d", job.id, version)
            ended = "succeeded"
        except StopRequested:
            with database.begin() as session:
                jobs.release(session, job.id, lease.token)
            log.info("job %d: given back to the queue at its checkpoint", job.id)
            return job.id
        except LeaseLost as error:
            losses.inc()
            log.warning("%s", error)
            return job.id
        except OperationalError as error:
            # The database is away. The lease lapses, and whoever claims the job goes on from its checkpoint.
            log.warning("job %d: left to its lease, the database does not answer: %s", job.id, error.orig)
            return job.id
        except (StoreAway, TeamBroken, SchemaMismatch) as error:
            # The same, of a remote store, a process that trained here or an upgrade that this release cannot work with;
            # begun too often this way, the job fails.
            log.warning("job %d: left to its lease: %s", job.id, error)
            return job.id
        except Cancelled:
            ended = _finish(database, lease, "cancelled", None)
        except TweetscoreError as error:
            ended = _finish(database, lease, "failed", str(error))
        except Exception as error:
            log.exception("job %d failed", job.id)
            ended = _finish(database, lease, "failed", f"{type(error).__name__}: {error}")
    if ended in ("succeeded", "cancelled"):  # one that failed may be retried, and goes on from its checkpoint
        _checkpoints(workshop, job).clear()
    return job.id


def _work(database: Database, workshop: Workshop, job: TrainingJob, lease: Lease, at_hand: ExitStack) -> int:
    config = make_config("guide", **job.config)

    store, roots = workshop.input_store, workshop.read_roots
    with dataset_at_hand(job.dataset, job.dataset_sha256, store, roots) as dataset:
        data, sha256 = split_rows(read_rows(dataset), config), file_sha256(dataset)
    with database.begin() as session:
        jobs.record_data(session, job.id, lease.token, sha256, data.report)
    failpoint.passing("split")
    lease.check()

    with database.read() as session:
        pinned = registry.revision_used(session, present_name(config.base_model))
    encoder = at_hand.enter_context(encoder_at_hand(config.base_model, config.base_revision or pinned, store, roots))
    tokenizer = load_tokenizer(encoder.folder)
    encode = TextEncoder(tokenizer)
    rows = {
        part: encode(split.texts, config.max_length)
        for part, split in (("train", data.train), ("valid", data.valid), ("test", data.test))
    }
    device = pick_device(workshop.devices[0])
    model = build_model(encoder, len(data.labels), config)
    config = model.config  # its pooling settled for this encoder
    lease.check()

    inputs = FitInputs(
        data.train, data.valid, rows["train"], rows["valid"], data.labels, config, tokenizer.pad_token_id
    )
    fitted = fit_on(
        workshop.devices,
        model,
        inputs,
        checkpoints=at_hand.enter_context(_checkpoints(workshop, job)),
        board_folder=workshop.boards_folder / f"job-{job.id}",
        hooks=_hooks(database, lease),
    )

    def logits(part: str, split: Split) -> Floats:
        batch_size, pad_id = config.test_batch_size, tokenizer.pad_token_id
        return predict(model, rows[part], split.targets, config, batch_size, pad_id, device, lease.check).logits

    valid, tested = logits("valid", data.valid), logits("test", data.test)
    temperature = fit_temperature(valid, data.valid.targets, config.task)
    figures = model_figures(data.test.targets, tested, temperature, data.labels, config)
    if config.baseline:
        figures |= baselines(data, config.task)
    failpoint.passing("evaluated")
    lease.check()

    spec = make_spec(data.labels, config, encoder, tokenizer, temperature)
    reference = make_reference(rows["valid"], valid)
    outcome = Outcome(job.id, lease.token, spec, dataset.name, sha256, data, fitted.history, figures, tested)
    return register_model(database, workshop.model_store, model, tokenizer, reference, outcome)


def _checkpoints(workshop: Workshop, job: TrainingJob) -> Checkpoints:
    return Checkpoints(workshop.jobs_folder / str(job.id), job.fencing_token, workshop.checkpoint_store)


def _hooks(database: Database, lease: Lease) -> Hooks:
    def on_resume(progress: Progress) -> None:
        if progress.step:
            log.info("job %d: goes on from step %d", lease.job_id, progress.step)
        with database.begin() as session:
            jobs.hold(session, lease.job_id, lease.token)
            jobs.forget_epochs_after(session, lease.job_id, progress.epoch - 1)
            for figures in progress.history:
                session.merge(EpochMetric(job_id=lease.job_id, **figures))

    def on_epoch(epoch: Epoch) -> None:
        log.info(
            "job %d: Epoch: %d, Loss: %.4f, lr: %.3g, Validation Accuracy = %.4f",
            lease.job_id,
            epoch.epoch,
            epoch.train_loss,
            epoch.learning_rate,
            epoch.valid_accuracy,
        )
        with database.begin() as session:
            jobs.record_epoch(session, lease.token, EpochMetric(job_id=lease.job_id, **asdict(epoch)))
        failpoint.passing("recorded")

    return Hooks(on_resume, lease.step, on_epoch)


def _finish(database: Database, lease: Lease, state: str, error: str | None) -> str | None:
    """Returns the state the job is in now, None when it is somebody else's by now."""
    try:
        with database.begin() as session:
            jobs.finish(session, lease.job_id, lease.token, state, error)
        # Why it failed stands in its row alone: an error may quote the dataset.
        hint = f"; `tweetscore jobs show {lease.job_id}` says why" if error else ""
        log.info("job %d: %s%s", lease.job_id, state, hint)
    except LeaseLost as lost:
        losses.inc()
        log.warning("%s", lost)
        return None
    return state
