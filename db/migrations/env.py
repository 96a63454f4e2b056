"""Alembic's entry: runs on the connection it is handed, or, from the `alembic` command, on DATABASE_URL."""

import os

from alembic import context
from sqlalchemy import Connection

from db.models import Base
from db.session import open_database


def migrate(connection: Connection) -> None:
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
