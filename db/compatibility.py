"""Which schemas this code can work with, and which code a schema can work with. Both are numbers of migrations.

A newer schema is accepted as long as nothing that this code uses was taken away: each schema names the oldest code that
may still work with it, in `schema_compatibility`. A migration that only adds leaves that row alone; one that removes or
changes something raises it in its own transaction. So an upgrade is rolled in three steps: a migration that expands, a
release that uses what is new and no longer what is old, a migration that contracts.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sqlalchemy import inspect, text
from sqlalchemy.orm import Session

from db.errors import SchemaMismatch
from db.session import Database

MIGRATIONS = Path(__file__).parent / "migrations"
# The oldest schema that has all that this code uses: the newest migration that added to the models.
OLDEST_SCHEMA = "0008"

REVISION = "SELECT version_num FROM alembic_version"
OLDEST_CODE = "SELECT oldest_code FROM schema_compatibility"


@dataclass(frozen=True)
class Schema:
    """What a database holds: its newest migration, None when it is empty, and the oldest code that may work with it."""

    revision: str | None
    oldest_code: str | None

    @property
    def misfit(self) -> str | None:
        """Why this code cannot work with it and what to do, in one sentence; None when it can."""
        if self.revision is None:
            return "the database is empty; let its owner run `tweetscore db upgrade`"
        if self.revision < OLDEST_SCHEMA:
            return (
                f"the database has schema {self.revision}, this release needs {OLDEST_SCHEMA} or newer; "
                "let its owner run `tweetscore db upgrade`"
            )
        needed = self.oldest_code or self.revision
        if self.revision > newest_revision() and needed > newest_revision():
            return (
                f"the database has schema {self.revision} for releases that know {needed} or newer, this one knows "
                f"{newest_revision()}; upgrade tweetscore and start it again"
            )
        return None


@cache
def newest_revision() -> str:
    """By the migrations' file names, which are numbered: Alembic takes longer to load than all else a command does."""
    return max(path.name.partition("_")[0] for path in (MIGRATIONS / "versions").glob("[0-9]*.py"))


def find(database: Database) -> Schema:
    """The schema as it is now; raises what SQLAlchemy raises when the database cannot be asked."""
    # A look must not wait for a transaction that writes.
    with database.engine.connect().execution_options(tweetscore_read=True) as connection:
        tables = inspect(connection)
        if not tables.has_table("alembic_version"):
            return Schema(None, None)
        oldest = connection.scalar(text(OLDEST_CODE)) if tables.has_table("schema_compatibility") else None
        return Schema(connection.scalar(text(REVISION)), oldest)


def check(session: Session) -> None:
    """Raises `SchemaMismatch` when this transaction must not write. Migrations wait until the transaction has ended.

    On PostgreSQL by the lock that reading a table takes, which a migration excludes; SQLite has one writer at a time.
    """
    revision, oldest_code = session.execute(text(f"SELECT ({REVISION}), ({OLDEST_CODE})")).one()
    if misfit := Schema(revision, oldest_code).misfit:
        raise SchemaMismatch(misfit)
