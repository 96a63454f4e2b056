"""Bring a database to the newest schema."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import inspect, text
from sqlalchemy.exc import SQLAlchemyError

from db.errors import DatabaseError, public_url
from db.session import Database

INSUFFICIENT_PRIVILEGE = "42501"


def upgrade(database: Database) -> None:
    """Run every missing migration; raises `DatabaseError` when the database cannot be reached or is too new."""
    try:
        head = _script().get_current_head()
        if _revision(database) == head:
            return
        with database.engine.begin() as connection:
            if database.engine.dialect.name == "postgresql":
                # Workers that start together migrate one after the other.
                connection.execute(text("SELECT pg_advisory_xact_lock(7413952)"))
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except CommandError as error:
        raise DatabaseError(f"the database has a newer schema ({error}); upgrade tweetscore") from error
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
    return _revision(database) == _script().get_current_head()


def _revision(database: Database) -> str | None:
    # A look must not wait for whoever is writing.
    with database.engine.connect().execution_options(tweetscore_read=True) as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        return str(connection.scalar(text("SELECT version_num FROM alembic_version")))


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def _script() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _first_line(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]
