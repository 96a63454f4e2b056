"""How long analysts wait beside a million predictions: `python -m tests.benchmarks.views [--rows N] [--plans]`.

Every view with a question people ask of it, on SQLite and on PostgreSQL, the median of several rounds.
"""

import argparse
import sys
import time
from statistics import median

from db import migrate
from db.session import open_database
from tests.benchmarks.bulk import MILLION, fill, two_databases
from tests.support.rows import answer, assign, make_version

ROUNDS = 5
QUESTIONS = {
    "v_predictions_current": "SELECT label, count(*) FROM v_predictions_current GROUP BY label",
    "v_predictions_current, newest": "SELECT * FROM v_predictions_current ORDER BY scored_at DESC LIMIT 100",
    "v_sentiment_hourly": "SELECT * FROM v_sentiment_hourly ORDER BY hour_utc",
    "v_sentiment_daily_jst": "SELECT * FROM v_sentiment_daily_jst ORDER BY day_jst",
    "v_topic_sentiment": "SELECT * FROM v_topic_sentiment",
    "v_model_leaderboard": "SELECT * FROM v_model_leaderboard",
    "v_jobs": "SELECT * FROM v_jobs",
    "v_live_quality": "SELECT * FROM v_live_quality",
    "v_drift": "SELECT * FROM v_drift ORDER BY day",
    "v_low_confidence": "SELECT * FROM v_low_confidence ORDER BY probability LIMIT 100",
    "v_low_confidence, counted": "SELECT count(*) FROM v_low_confidence",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.views", description=__doc__)
    parser.add_argument("--rows", type=int, default=MILLION)
    parser.add_argument("--plans", action="store_true", help="show how each database goes about it")
    options = parser.parse_args()
    for kind in ("sqlite", "postgresql"):
        with two_databases(kind) as (_, url):
            database = open_database(url)
            migrate.upgrade(database)
            version = make_version(database)
            assign(database, version)
            print(f"{kind}: {options.rows:,} predictions made in {fill(database, version, options.rows):.0f} s")
            for name, sql in QUESTIONS.items():
                times = []
                for _ in range(ROUNDS):
                    began = time.perf_counter()
                    rows = answer(database, sql)
                    times.append(1000 * (time.perf_counter() - began))
                print(f"  {name:32}{median(times):8.1f} ms, {len(rows):,} rows", flush=True)
                if options.plans:
                    explain = "EXPLAIN QUERY PLAN" if kind == "sqlite" else "EXPLAIN"
                    with database.engine.connect() as connection:
                        for row in connection.exec_driver_sql(f"{explain} {sql}"):
                            print(f"      {row[-1]}")
            database.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
