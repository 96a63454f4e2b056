"""The route of a backfill: stored tweets -> chunk -> tokenise -> forward -> store.

Tweets that have a prediction are skipped, so a backfill is resumable, and safe to run twice at once. New tweets come
first: before each chunk the backfill waits while the stream holds records, up to a limit.
"""

import logging
import time
from collections.abc import Callable
from datetime import datetime

from db import predictions, registry
from db.models import utc_now
from db.session import Database
from worker.errors import StreamError
from worker.scoring.scores import prediction_rows
from worker.scoring.scoring_model import open_model, serving_from
from worker.settings import Settings
from worker.stream.stream import Depth

log = logging.getLogger(__name__)

# Small enough that a scoring worker of the same machine or SQLite file waits only milliseconds.
CHUNK_TWEETS = 128
POLL_SECONDS = 0.2
# A stream that is never empty, or that no worker reads, slows a backfill down but does not stop it.
MAX_WAIT_SECONDS = 10.0


def rescore(
    database: Database,
    settings: Settings,
    version_id: int,
    since: datetime | None,
    depth: Callable[[], Depth | None],
    progress: Callable[[int, int, bool], None] = lambda done, total, waiting: None,
) -> int:
    """Score every stored tweet without a prediction of this model version. Returns the number of tweets scored.

    `since` selects tweets written from then on. `depth` returns the depth of the stream, None without a server.
    `progress` gets (done, total, whether it waits for new tweets). Raises `NotFound` or `BadArtifact`.
    """
    with database.read() as session:
        version = registry.usable(session, version_id)
        until = utc_now()  # later tweets are scored by the workers
        total = predictions.unscored_count(session, version_id, since, until)
    done, after = 0, ""
    progress(done, total, False)
    with open_model(version, serving_from(settings)) as opened:
        while True:
            waits_until = time.monotonic() + MAX_WAIT_SECONDS
            while _busy(depth) and time.monotonic() < waits_until:
                progress(done, total, True)
                time.sleep(POLL_SECONDS)
            with database.read() as session:
                chunk = predictions.unscored(session, version_id, since, until, after, CHUNK_TWEETS)
            if not chunk:
                return done
            model = opened.current()
            scores = model.forward(model.tokenise([text for _, text in chunk]))
            rows = prediction_rows(model, [id_ for id_, _ in chunk], scores)
            with database.begin() as session:
                # Tweets may have been deleted since the chunk was read.
                present = predictions.present(session, [id_ for id_, _ in chunk])
                predictions.add_predictions(session, [row for row in rows if row["tweet_id"] in present])
            done, after = done + len(chunk), chunk[-1][0]
            progress(done, max(total, done), False)


def _busy(depth: Callable[[], Depth | None]) -> bool:
    try:
        found = depth()
    except StreamError as error:
        log.warning("the stream does not answer, the backfill continues: %s", error)
        return False
    return found is not None and not found.idle
