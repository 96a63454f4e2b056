"""Which way rows come into PostgreSQL fastest: `python -m tests.benchmarks.upserts`.

A window of 512 tweets and their predictions, new ones each time, in one transaction as the pipeline commits it;
the ways in turns, the median of several rounds. tweetscore goes the first way.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session

from db import migrate, predictions
from db.models import Base, Prediction, Tweet
from db.session import open_database
from tests.benchmarks.bulk import two_databases
from tests.support.rows import assign, make_version, prediction_row, tweet_row

ROWS, ROUNDS = 512, 15
Rows = Sequence[dict[str, Any]]
Way = Callable[[Session, type[Base], Rows], None]


def one_parameter(session: Session, table: type[Base], rows: Rows) -> None:
    {Tweet: predictions.add_tweets, Prediction: predictions.add_predictions}[table](session, rows)  # type: ignore[index]


def executemany(session: Session, table: type[Base], rows: Rows) -> None:
    session.execute(postgresql.insert(table.__table__).on_conflict_do_nothing(), rows)  # type: ignore[arg-type]


def many_values(session: Session, table: type[Base], rows: Rows) -> None:
    session.execute(postgresql.insert(table.__table__).values(rows).on_conflict_do_nothing())  # type: ignore[arg-type]


def copied(session: Session, table: type[Base], rows: Rows) -> None:
    name, columns = table.__tablename__, ", ".join(rows[0])
    driver = session.connection().connection.driver_connection
    assert driver is not None
    with driver.cursor() as cursor:
        cursor.execute(f"CREATE TEMP TABLE incoming (LIKE {name} INCLUDING DEFAULTS) ON COMMIT DROP")
        with cursor.copy(f"COPY incoming ({columns}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row([json.dumps(v, ensure_ascii=False) if isinstance(v, dict) else v for v in row.values()])
        cursor.execute(f"INSERT INTO {name} ({columns}) SELECT {columns} FROM incoming ON CONFLICT DO NOTHING")
        cursor.execute("DROP TABLE incoming")


WAYS: dict[str, Way] = {
    "json_populate_recordset": one_parameter, "COPY into a temporary table": copied,
    "executemany": executemany, "one INSERT of many VALUES": many_values,
}  # fmt: skip


def main() -> int:
    with two_databases("postgresql") as (url, _):
        database = open_database(url)
        migrate.upgrade(database)
        version = make_version(database)
        assign(database, version)
        times: dict[str, list[float]] = {name: [] for name in WAYS}
        for number in range(ROUNDS):
            for name, way in WAYS.items():
                ids = [f"{name}-{number}-{i:04}" for i in range(ROWS)]
                began = time.perf_counter()
                with database.begin() as session:
                    way(session, Tweet, [tweet_row(id_) for id_ in ids])
                    way(session, Prediction, [prediction_row(id_, version) for id_ in ids])
                times[name].append(1000 * (time.perf_counter() - began))
        with database.read() as session:
            assert predictions.prediction_count(session) == ROUNDS * len(WAYS) * ROWS
        database.close()
    first = median(times["json_populate_recordset"])
    for name, found in times.items():
        print(f"{name:30}{median(found):8.1f} ms a window, {median(found) / first:.2f} times the first")
    return 0


if __name__ == "__main__":
    sys.exit(main())
