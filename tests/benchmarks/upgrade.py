"""How long the migrations take that make partitions and sums: `python -m tests.benchmarks.upgrade [--rows 10000000]`.

Fills a PostgreSQL with the schema of before, whose tables have no partitions, and upgrades it. While it runs, scoring
waits, and tweets stay in the stream. With 10 million rows it needs 10 GB of disk.
"""

import argparse
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import psycopg

from db import migrate
from db.admin import partitions
from db.admin.partitions import OTHER_BITS, first_id
from db.session import open_database
from tests.benchmarks.cpu import this_cpu
from tests.benchmarks.store import DAY, FILL, MODEL_VERSION, server
from tests.support.releases import upgrade_to

BEFORE = "0004"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    rows = parser.parse_args().rows
    print(this_cpu())
    with (
        tempfile.TemporaryDirectory(prefix="upgrade-", ignore_cleanup_errors=True) as folder,
        server(Path(folder)) as url,
    ):
        database = open_database(url)
        upgrade_to(database, BEFORE)
        began = time.perf_counter()
        with psycopg.connect(url) as connection:
            connection.execute("SET session_replication_role = replica")  # without triggers and foreign keys
            fill = FILL.format(
                tweets="tweets", predictions="predictions", first=int(first_id(DAY)) >> OTHER_BITS, count=rows,
                day=DAY.isoformat(),
            )  # fmt: skip
            connection.execute(MODEL_VERSION)
            connection.execute(fill)  # type: ignore[arg-type]
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("VACUUM (ANALYZE)")
            connection.execute("CHECKPOINT")
        print(f"{rows:,} tweets and predictions: filled in {time.perf_counter() - began:.0f} s", flush=True)
        began = time.perf_counter()
        migrate.upgrade(database)
        print(f"upgraded in {time.perf_counter() - began:.1f} s")
        began = time.perf_counter()
        with database.begin() as session:
            dropped = [partition for partition in partitions.listed(session) if partition.name == "before"]
            late = partitions.drop(session, dropped[0], datetime.now(UTC))
        print(f"dropped as a whole in {1000 * (time.perf_counter() - began):.0f} ms, {late} rows kept")
        database.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
