"""`tweetscore db`: the schema, and who may look at it."""

from collections.abc import Callable
from typing import Annotated

import typer

from db import migrate
from db.errors import public_url
from db.session import Database, open_database
from worker import show
from worker.runtime import open_sql
from worker.settings import load_settings

app = typer.Typer(no_args_is_help=True, help="The database: bring it up to date, let others look.")


@app.command()
def upgrade() -> None:
    """Bring the database to this release's schema; with SQLite workers and commands do it too, when they start."""
    settings = load_settings()
    database = open_database(settings.sql_url)
    migrate.upgrade(database)
    place, schema = public_url(settings.sql_url), migrate.check(database)
    database.close()
    show.console.print(f"{place} has schema {schema}", markup=False, soft_wrap=True)


@app.command("grant-worker")
def let_work(role: Annotated[str, typer.Argument(help="A PostgreSQL role that exists.")]) -> None:
    """Let a PostgreSQL role read and write rows, and change no schema: what workers need."""
    from db.roles import grant_worker

    _grant(grant_worker, role)
    show.console.print(f"{role} may read and write the rows of every table, and change no schema")


@app.command("grant-readonly")
def let_look(role: Annotated[str, typer.Argument(help="A PostgreSQL role that exists.")]) -> None:
    """Let a PostgreSQL role SELECT, and nothing else; name its URL in TWEETSCORE_READER_URL."""
    from db.roles import grant_readonly

    _grant(grant_readonly, role)
    show.console.print(f"{role} may look at every table and view, and write none")


def _grant(grant: Callable[[Database, str], None], role: str) -> None:
    database = open_sql(load_settings())
    try:
        grant(database, role)
    finally:
        database.close()
