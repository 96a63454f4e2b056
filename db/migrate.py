"""Bring a database to the newest schema."""

from pathlib import Path

from sqlalchemy import inspect, text
from sqlalchemy.exc import SQLAlchemyError

from db.errors import DatabaseError, public_url
from db.session import Database

MIGRATIONS = Path(__file__).parent / "migrations"
INSUFFICIENT_PRIVILEGE = "42501"


def upgrade(database: Database) -> None:
    """Run every missing migration; raises `DatabaseError` when the database cannot be reached or is too new."""
    try:
        if not is_current(database):
            _run_missing(database)
    except SQLAlchemyError as error:
        if getattr(getattr(error, "orig", None), "sqlstate", None) == INSUFFICIENT_PRIVILEGE:
            raise DatabaseError(
                "the database lacks this release's schema, or this role the rights to it: let its owner run "
                "`tweetscore db upgrade` and `tweetscore db grant-worker`"
            ) from error
        shown = public_url(database.engine.url.render_as_string(hide_password=True))
        raise DatabaseError(f"the database {shown!r} cannot be used: {_first_line(error)}") from error


def is_current(database: Database) -> bool:
    """Whether the schema is the newest one."""
    return _revision(database) == newest_revision()


def newest_revision() -> str:
    """By the migrations' file names, which are numbered: Alembic takes longer to load than all else a command does."""
    return max(path.name.partition("_")[0] for path in (MIGRATIONS / "versions").glob("[0-9]*.py"))


def _run_missing(database: Database) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    try:
        with database.engine.begin() as connection:
            if database.engine.dialect.name == "postgresql":
                # Workers that start together migrate one after the other.
                connection.execute(text("SELECT pg_advisory_xact_lock(7413952)"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except CommandError as error:
        raise DatabaseError(f"the database has a newer schema ({error}); upgrade tweetscore") from error


def _revision(database: Database) -> str | None:
    # A look must not wait for whoever is writing.
    with database.engine.connect().execution_options(tweetscore_read=True) as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        return str(connection.scalar(text("SELECT version_num FROM alembic_version")))


def _first_line(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]
