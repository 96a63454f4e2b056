"""Which schemas this code can work with, and which code a schema can work with. Both are numbers of migrations.

Code accepts a newer schema as long as nothing that it uses was removed. Each schema names the oldest code that can work
with it, in `schema_compatibility`. A migration that only adds leaves that row alone; one that removes or changes
something raises it in its own transaction. A rolling upgrade therefore takes three steps: a migration that expands, a
release that uses only what is new, and a migration that contracts.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sqlalchemy import inspect, text
from sqlalchemy.orm import Session

from db.errors import SchemaMismatch, shown
from db.session import Database

MIGRATIONS = Path(__file__).parent / "migrations"
# The oldest schema with every table and column of the models: the newest migration that added to them.
OLDEST_SCHEMA = "0007"
# Databases from before version 0.1.0 hold this value or have no `schema_compatibility`, and their migrations have other
# contents than the released ones of the same numbers. No released migration may write this value or have this number.
DEVELOPMENT_OLDEST_CODE = "0005"

REVISION = "SELECT version_num FROM alembic_version"
OLDEST_CODE = "SELECT oldest_code FROM schema_compatibility"


@dataclass(frozen=True)
class Schema:
    """The state of a database: its newest migration, and the oldest code that can work with it.

    `revision` is None for an empty database, `oldest_code` for one without `schema_compatibility`.
    """

    revision: str | None
    oldest_code: str | None

    @property
    def is_foreign(self) -> bool:
        """Whether a version before 0.1.0, or another program that uses Alembic, made this schema."""
        return self.revision is not None and self.oldest_code in (None, DEVELOPMENT_OLDEST_CODE)

    @property
    def misfit(self) -> str | None:
        """One sentence on why this code cannot work with the schema and on the remedy; None when it can."""
        if self.revision is None:
            return "the database is empty; let its owner run `tweetscore db upgrade`"
        if self.is_foreign:
            return (
                f"the database has schema {shown(self.revision)} of a development version before 0.1.0 or of another "
                "program, which cannot be upgraded; set DATABASE_URL to a new database"
            )
        if self.revision < OLDEST_SCHEMA:
            return (
                f"the database has schema {self.revision}, this release needs {OLDEST_SCHEMA} or newer; "
                "let its owner run `tweetscore db upgrade`"
            )
        needed = str(self.oldest_code)  # never None here: the schema is not foreign
        if self.revision > newest_revision() and needed > newest_revision():
            return (
                f"the database has schema {self.revision} for releases with migration {needed} or newer, this release "
                f"ends at {newest_revision()}; upgrade tweetscore and start it again"
            )
        return None


@cache
def newest_revision() -> str:
    """Read from the numbered file names, since loading Alembic takes longer than the rest of most commands."""
    return max(path.name.partition("_")[0] for path in (MIGRATIONS / "versions").glob("[0-9]*.py"))


def find(database: Database) -> Schema:
    """The current schema. Raises SQLAlchemy's errors when the database cannot be read."""
    # A read transaction does not wait for writers.
    with database.engine.connect().execution_options(tweetscore_read=True) as connection:
        tables = inspect(connection)
        if not tables.has_table("alembic_version"):
            return Schema(None, None)
        oldest = connection.scalar(text(OLDEST_CODE)) if tables.has_table("schema_compatibility") else None
        return Schema(connection.scalar(text(REVISION)), oldest)


def check(session: Session) -> None:
    """Raises `SchemaMismatch` when this transaction must not write. Migrations wait until the transaction has ended.

    On PostgreSQL this read takes a lock that conflicts with a migration's; SQLite has one writer at a time.
    """
    revision, oldest_code = session.execute(text(f"SELECT ({REVISION}), ({OLDEST_CODE})")).one()
    if misfit := Schema(revision, oldest_code).misfit:
        raise SchemaMismatch(misfit)
