"""Upgrade a database to the newest schema, or check that this code can work with the schema it has."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy.exc import OperationalError, SQLAlchemyError

from db import compatibility
from db.compatibility import MIGRATIONS, newest_revision
from db.errors import DatabaseError, RightsMissing, SchemaMismatch, public_url
from db.session import Database

INSUFFICIENT_PRIVILEGE = "42501"
# A deadlock with workers, or a lock timeout. While a migration waits for a lock, other transactions wait behind it.
CONTENDED = ("40P01", "55P03")
PAUSES_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)


# Partitions, which are named as their table and a suffix. The models know the whole tables alone.
PARTITION = re.compile(r"(tweets|predictions)_(other|before|[0-9_]+)")


def compared_on(dialect: str) -> Callable[..., bool]:
    """Alembic's `include_object`: whether it compares an object with the models on this kind of database."""

    def include_object(given: Any, name: str | None, kind: str, reflected: bool, _compared_to: object) -> bool:
        if kind == "table":
            return PARTITION.fullmatch(name or "") is None
        return reflected or given.info.get("only_on", dialect) == dialect

    return include_object


def upgrade(database: Database) -> None:
    """Run every missing migration; raises `DatabaseError` when the database cannot be reached or its schema is too new.

    A newer schema that this code can work with is not changed. A schema of a development version is refused.
    """
    with _as_database_errors(database):
        for pause in (*PAUSES_SECONDS, None):
            try:
                _upgrade(database)
                return
            except OperationalError as error:
                if pause is None or _sqlstate(error) not in CONTENDED:
                    raise
                time.sleep(pause)


def prepare(database: Database) -> None:
    """Ensure that this code can work with the database; raises `SchemaMismatch` or `DatabaseError` when it cannot.

    A SQLite file, which belongs to one machine, is upgraded. PostgreSQL is upgraded only by `tweetscore db upgrade`.
    """
    if database.engine.dialect.name == "sqlite":
        upgrade(database)
    else:
        check(database)


def check(database: Database) -> str:
    """The number of the schema. Raises the same errors as `prepare` and changes nothing."""
    with _as_database_errors(database):
        found = compatibility.find(database)
    if found.misfit:
        raise SchemaMismatch(found.misfit)
    return str(found.revision)


def is_current(database: Database) -> bool:
    """Whether the newest migration of this code has run."""
    return compatibility.find(database).revision == newest_revision()


def _upgrade(database: Database) -> None:
    found = compatibility.find(database)
    if found.is_foreign:
        raise SchemaMismatch(str(found.misfit))
    if found.revision is None or found.revision < newest_revision():
        _run_missing(database)
    elif found.misfit:
        raise SchemaMismatch(found.misfit)


def _run_missing(database: Database) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    try:
        with database.engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except CommandError as error:
        raise DatabaseError(
            f"this release does not contain the database's schema ({error}); upgrade tweetscore"
        ) from error


@contextmanager
def _as_database_errors(database: Database) -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        if _sqlstate(error) == INSUFFICIENT_PRIVILEGE:
            raise RightsMissing(
                "this role lacks privileges on the database's schema; let its owner run `tweetscore db upgrade` and "
                "`tweetscore db grant-worker` or `grant-readonly`"
            ) from error
        shown = public_url(database.engine.url.render_as_string(hide_password=True))
        raise DatabaseError(f"the database {shown!r} cannot be used: {_first_line(error)}") from error


def _sqlstate(error: SQLAlchemyError) -> str | None:
    return getattr(getattr(error, "orig", None), "sqlstate", None)


def _first_line(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]
