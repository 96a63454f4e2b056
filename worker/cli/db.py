"""`tweetscore db`: upgrade the schema, grant rights, list partitions, back up and restore. `tweetscore replay`: score
records again."""

from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from db.errors import public_url
from worker.cli import output
from worker.cli.output import Json

if TYPE_CHECKING:
    from db.session import Database
    from worker.settings import Settings

TIMES = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%SZ"]
app = typer.Typer(no_args_is_help=True, help="Upgrade the database's schema, grant rights, back up and restore.")


@app.command()
def upgrade() -> None:
    """Upgrade the database to this release's schema.

    With SQLite, workers and commands do this when they start.
    """
    from db import migrate
    from db.session import open_database
    from worker.maintenance.retention import add_partitions
    from worker.settings import load_settings

    settings = load_settings()
    database = open_database(settings.sql_url)
    migrate.upgrade(database)
    place, schema = public_url(settings.sql_url), migrate.check(database)
    add_partitions(database.begin, settings.retention_days)
    database.close()
    output.console.print(f"{place} has schema {schema}", markup=False, soft_wrap=True)


@app.command()
def partitions(json: Json = False) -> None:
    """List the partitions of tweets and predictions on PostgreSQL.

    Workers add them ahead, and drop them when retention is over. The numbers of rows are the server's estimates.
    """
    from db.admin import partitions
    from worker.connections import open_sql
    from worker.settings import load_settings

    database = open_sql(load_settings())
    with database.read() as session:
        found = partitions.listed(session)
    database.close()
    if json:
        output.as_json([asdict(partition) for partition in found])
        return
    if not found:
        output.console.print("the tables have no partitions")
        return
    columns = ("name", "from (UTC)", "until (UTC)", "tweets", "predictions", "MB")
    rows = [(p.name, p.start, p.end, f"{p.tweets:,}", f"{p.predictions:,}", f"{p.bytes / 1e6:,.1f}") for p in found]
    output.table(None, columns, rows)


@app.command("grant-worker")
def db_grant_worker(role: Annotated[str, typer.Argument(help="Name of an existing PostgreSQL role.")]) -> None:
    """Grant a PostgreSQL role the rights of a worker: to read and write rows."""
    from db.admin.roles import grant_worker

    _grant(grant_worker, role)
    output.console.print(f"{role} may read and write the rows of every table, but not change the schema")


@app.command("grant-readonly")
def db_grant_readonly(role: Annotated[str, typer.Argument(help="Name of an existing PostgreSQL role.")]) -> None:
    """Grant a PostgreSQL role SELECT only; set TWEETSCORE_READER_URL to its URL."""
    from db.admin.roles import grant_readonly

    _grant(grant_readonly, role)
    output.console.print(f"{role} may read every table and view, but not write")


def _grant(grant: "Callable[[Database, str], None]", role: str) -> None:
    from worker.connections import open_sql
    from worker.settings import load_settings

    database = open_sql(load_settings())
    try:
        grant(database, role)
    finally:
        database.close()


@app.command()
def backup(
    path: Annotated[Path, typer.Argument(help="File to write; an older backup there is replaced.")], json: Json = False
) -> None:
    """Back up a SQLite database while workers write to it, and check the copy."""
    from db.admin import backup as backups
    from worker.connections import open_sql
    from worker.maintenance.backups import replay_since
    from worker.settings import load_settings

    settings = load_settings()
    database = backups.sqlite_file(settings.sql_url)
    if database.is_file():
        open_sql(settings).close()  # a backup has a schema that this release can use
    made = backups.backup(database, path, replay_since(settings))
    if json:
        output.as_json(vars(made))
    else:
        output.line(f"{made.path}: {made.bytes:,} bytes, schema {made.schema}, checked")


@app.command()
def restore(
    path: Annotated[Path, typer.Argument(help="A file that `tweetscore db backup` wrote.")],
    force: Annotated[bool, typer.Option("--force", help="Restore while workers run.")] = False,
    json: Json = False,
) -> None:
    """Restore a SQLite database, and let workers score again what the stream has received since the backup.

    The old database is kept in a file beside the new one.
    """
    from db.admin import backup as backups
    from db.errors import InUse, TweetscoreError
    from worker.connections import open_sql, prepare_home
    from worker.process.heartbeat import read_heartbeats
    from worker.settings import load_settings

    settings = load_settings()
    database = backups.sqlite_file(settings.sql_url)
    made = backups.read_backup(path)
    if not force and (workers := [beat.pid for beat in read_heartbeats(settings.run) if not beat.stale]):
        raise InUse(f"workers use {database} (processes {', '.join(workers)}); stop them, or give --force")
    prepare_home(settings)
    aside = backups.restore(made, database, force)
    open_sql(settings).close()  # upgrades an older schema
    first, problem = None, None
    try:
        first = _rewind(settings, made.replay_since)
    except TweetscoreError as error:
        since = f" --since {made.replay_since:%Y-%m-%dT%H:%M:%SZ}" if made.replay_since else ""
        problem = f"the stream cannot be replayed: {error}; run `tweetscore replay{since}` later"
    if json:
        output.as_json({**vars(made), "replaced": aside, "replayed_from": first, "problem": problem})
    else:
        output.line(f"{database} is restored as of {made.made_at:%Y-%m-%d %H:%M:%S} UTC")
        if aside is not None:
            output.line(f"the old one is {aside}")
        if problem is None:
            output.line(_replayed(made.replay_since, first))
    if problem is not None:
        output.aside(problem)
        raise typer.Exit(1)


def replay(
    since: Annotated[
        datetime | None, typer.Option(formats=TIMES, help="Only records received from this time on, UTC.")
    ] = None,
    json: Json = False,
) -> None:
    """Let workers score the records again that the stream still holds, after a backup of the database was restored.

    See TWEETSCORE_STREAM_KEEP_HOURS. A tweet that has its row already keeps it.
    """
    from worker.settings import load_settings

    since = since and since.replace(tzinfo=UTC)
    first = _rewind(load_settings(), since)
    if json:
        output.as_json({"since": since, "replayed_from": first})
    else:
        output.line(_replayed(since, first))


def _rewind(settings: "Settings", since: datetime | None) -> datetime | None:
    from worker.connections import broker, open_stream
    from worker.maintenance.backups import replay as rewind

    with broker(settings, output.aside) as url:
        return rewind(open_stream(settings, url), since)


def _replayed(since: datetime | None, first: datetime | None) -> str:
    received = f" since {since:%Y-%m-%d %H:%M:%S} UTC" if since else ""
    if first is None:
        return f"the stream holds no records{received}"
    return f"workers score the records{received} again; the first one is of {first:%Y-%m-%d %H:%M:%S} UTC"
