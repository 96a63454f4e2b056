"""Record the progress of a training run: epochs in SQL, checkpoints in the job's folder."""

import logging
from collections.abc import Callable
from dataclasses import asdict

from sqlalchemy.orm import Session

from db import jobs
from db.models import EpochMetric, TrainingJob
from training import failpoint
from training.evaluation.epoch import Epoch, quality_names
from training.jobs.context import TrainingContext
from training.jobs.lease import Lease
from training.loop.checkpoints import Checkpoints, Progress
from training.loop.fit import Hooks

log = logging.getLogger(__name__)


def job_checkpoints(context: TrainingContext, job: TrainingJob) -> Checkpoints:
    """Return the checkpoints of a job, written under its fencing token."""
    return Checkpoints(context.jobs_folder / str(job.id), job.fencing_token, context.checkpoint_store)


def recording_hooks(lease: Lease, on_step: Callable[[int, int, float | None, float | None], None], task: str) -> Hooks:
    """Return hooks that record steps, with `on_step`, and epochs under the lease, and log epochs."""
    accuracy = quality_names(task)[0].title()

    def on_resume(progress: Progress) -> None:
        if progress.step:
            log.info("job %d: resumes from step %d", lease.job_id, progress.step)
        last, history = progress.epoch - 1, list(progress.history)

        def restore_epochs(session: Session) -> None:
            jobs.require_token(session, lease.job_id, lease.token)
            jobs.delete_epochs_after(session, lease.job_id, last)
            for figures in history:
                session.merge(EpochMetric(job_id=lease.job_id, **figures))

        lease.record(restore_epochs)

    def on_epoch(epoch: Epoch) -> None:
        log.info(
            "job %d: Epoch: %d, Loss: %.4f, lr: %.3g, Validation %s = %.4f",
            lease.job_id,
            epoch.epoch,
            epoch.train_loss,
            epoch.learning_rate,
            accuracy,
            epoch.valid_accuracy,
        )
        lease.record(
            lambda session: jobs.record_epoch(session, lease.token, EpochMetric(job_id=lease.job_id, **asdict(epoch)))
        )
        failpoint.passing("recorded")

    return Hooks(on_resume, on_step, on_epoch)
