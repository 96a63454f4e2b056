"""The route of a backfill: stored tweets -> chunk -> tokenise -> forward -> store. It has no other way.

A tweet that has its row is passed over, so whoever is stopped goes on where he was, and two at once do no harm. New
tweets come first: before each chunk the stream is looked at, and for as long as tweets wait there, up to a limit, the
backfill waits too.
"""

import logging
import time
from collections.abc import Callable
from datetime import datetime

from db import predictions, registry
from db.models import utc_now
from db.session import Database
from worker.errors import StreamError
from worker.scorer import Model, describe, served, serving
from worker.settings import Settings
from worker.stream import Depth

log = logging.getLogger(__name__)

# Small enough that a scorer of the same machine, or the same SQLite file, waits for milliseconds.
CHUNK_TWEETS = 128
LOOK_SECONDS = 0.2
# A stream that is never empty, or that nobody reads, slows a backfill down and does not stop it.
LONGEST_WAIT_SECONDS = 10.0


def rescore(
    database: Database,
    settings: Settings,
    version_id: int,
    since: datetime | None,
    depth: Callable[[], Depth | None],
    progress: Callable[[int, int, bool], None] = lambda done, total, waiting: None,
) -> int:
    """Score every stored tweet that a model version has no prediction for. Returns how many were scored.

    `since` takes those written from then on. `depth` is asked how much the stream holds; None when there is none to
    ask. `progress` is told (done, total, whether new tweets are waited for). Raises `NotFound` or `BadArtifact`.
    """
    with database.read() as session:
        version = registry.usable(session, version_id)
        until = utc_now()  # what comes in later is the scoring workers'
        total = predictions.unscored_count(session, version_id, since, until)
    done, after = 0, ""
    progress(done, total, False)
    with served(version, serving(settings)) as running:
        while True:
            patience_ends = time.monotonic() + LONGEST_WAIT_SECONDS
            while _busy(depth) and time.monotonic() < patience_ends:
                progress(done, total, True)
                time.sleep(LOOK_SECONDS)
            with database.read() as session:
                chunk = predictions.unscored(session, version_id, since, until, after, CHUNK_TWEETS)
            if not chunk:
                return done
            rows = _score(running.current(), chunk)
            with database.begin() as session:
                there = predictions.present(session, [id_ for id_, _ in chunk])  # some may have been deleted meanwhile
                predictions.add_predictions(session, [row for row in rows if row["tweet_id"] in there])
            done, after = done + len(chunk), chunk[-1][0]
            progress(done, max(total, done), False)


def _score(model: Model, chunk: list[tuple[str, str]]) -> list[dict[str, object]]:
    said = describe(model.spec, model.forward(model.tokenise([text for _, text in chunk])).probabilities)
    now = utc_now()
    return [
        {"tweet_id": id_, "model_version_id": model.version_id, "scored_at": now, **scores}
        for (id_, _), scores in zip(chunk, said, strict=True)
    ]


def _busy(depth: Callable[[], Depth | None]) -> bool:
    try:
        found = depth()
    except StreamError as error:
        log.warning("the stream cannot be looked at, going on: %s", error)
        return False
    return found is not None and not found.idle
