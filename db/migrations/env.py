"""Alembic's entry: runs on the connection it is handed, or, from the `alembic` command, on DATABASE_URL."""

import os

from alembic import context
from sqlalchemy import Connection, inspect, text

from db.models import Base
from db.session import open_database

# Workers and questions that come meanwhile wait behind a migration that waits for a lock: it gives up and comes again.
LOCK_TIMEOUT = "3s"


def keep_others_out(connection: Connection) -> None:
    """One migration at a time, and none while a worker's transaction counts on the schema (`compatibility.check`)."""
    if connection.dialect.name != "postgresql":
        return
    connection.execute(text("SELECT pg_advisory_xact_lock(7413952)"))
    connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
    if inspect(connection).has_table("schema_compatibility"):
        connection.execute(text("LOCK TABLE schema_compatibility IN ACCESS EXCLUSIVE MODE"))


def migrate(connection: Connection) -> None:
    keep_others_out(connection)
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=True,  # SQLite alters a table by copying it
        compare_type=True,
    )
    with context.begin_transaction():
        context.run_migrations()


handed: Connection | None = context.config.attributes.get("connection")
if handed is not None:
    migrate(handed)
else:
    with open_database(os.environ["DATABASE_URL"]).engine.begin() as opened:
        migrate(opened)
