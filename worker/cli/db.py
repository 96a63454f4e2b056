"""`tweetscore db`: upgrade the schema, grant rights to PostgreSQL roles, list the partitions."""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from db.errors import public_url
from worker.cli import output
from worker.cli.output import Json

if TYPE_CHECKING:
    from db.session import Database

app = typer.Typer(no_args_is_help=True, help="Upgrade the database's schema and grant rights.")


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
