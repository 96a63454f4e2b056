"""Write the stored tweets that are worth labelling next to a file for annotators."""

import csv
import os
from pathlib import Path

import numpy as np

from db import predictions, registry
from db.errors import NotFound
from db.session import Database
from training.evaluation.to_label import CANDIDATES, pick_to_label
from worker.errors import BadRequest

COLUMNS = ("label", "text", "tweet_id", "predicted", "probability")


def pick(database: Database, place: str, count: int) -> int:
    """Write `count` tweets that the champion is unsure of and that differ from each other. Returns their number.

    The file is a CSV with an empty column `label`, as `train` reads it once it is filled in. Raises `NotFound` without
    a champion or without its predictions, and `BadRequest` when the file cannot be written.
    """
    with database.read() as session:
        version_id = registry.assigned(session, registry.CHAMPION)
        if version_id is None:
            raise NotFound("there is no champion yet; train a model and promote it")
        labels = registry.get(session, version_id).labels
        if len(labels) < 2:
            raise BadRequest(f"model {version_id} predicts a number, so it is never unsure; promote one with labels")
        candidates = predictions.least_certain(session, version_id, CANDIDATES * count)
    if not candidates:
        raise NotFound(f"model {version_id} has not scored a tweet yet; publish some with `tweetscore push`")
    probabilities = np.array([[row.probabilities[label] for label in labels] for row in candidates], np.float32)
    chosen = [candidates[i] for i in pick_to_label([row.text for row in candidates], probabilities, count)]
    draft = Path(f"{place}.{os.getpid()}.part")
    try:
        with draft.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(("", row.text, row.tweet_id, row.label, f"{row.probability:.4f}") for row in chosen)
        draft.replace(place)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise BadRequest(f"{place} cannot be written ({error.strerror}); name another file") from error
    return len(chosen)
