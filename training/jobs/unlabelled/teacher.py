"""The teacher of a job: a model version whose labels are those of the dataset."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from db import registry
from db.errors import listed
from db.models import ModelVersion
from training.errors import BadConfig


def find_teacher(session: Session, version_id: int, labels: Sequence[str]) -> ModelVersion:
    """Return the model version. Raises `NotFound` when it does not exist or was deleted.

    Raises `BadConfig` when it is a cascade, or its labels are not those of the dataset, in any order.
    """
    version = registry.usable(session, version_id)
    if (cascade := registry.cascade(session, version_id)) is not None:
        raise BadConfig(
            f"teacher {version_id} is a cascade; name the model that it passes tweets on to, {cascade.teacher_id}"
        )
    if set(version.labels) != set(labels):
        raise BadConfig(
            f"teacher {version_id} has the labels {listed(version.labels)}, but the dataset has {listed(labels)}; name "
            "a teacher with the same labels, or rename those of the dataset with --labels"
        )
    return version
