"""Entry point of Alembic: runs on the given connection, or on DATABASE_URL when started by the `alembic` command."""

import os

from alembic import context
from sqlalchemy import Connection, inspect, text

from db.migrate import compared_on
from db.models import Base
from db.session import open_database

# Other transactions wait behind a migration that waits for a lock, so it gives up after this time and is retried.
LOCK_TIMEOUT = "3s"


def keep_others_out(connection: Connection) -> None:
    """Allow one migration at a time, and none during a transaction that has checked the schema."""
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
        render_as_batch=True,  # SQLite alters a table by copying it, without its triggers
        compare_type=True,
        include_object=compared_on(connection.dialect.name),
    )
    with context.begin_transaction():
        context.run_migrations()


given: Connection | None = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    with open_database(os.environ["DATABASE_URL"]).engine.begin() as opened:
        migrate(opened)
