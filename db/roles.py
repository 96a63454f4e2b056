"""A PostgreSQL role that may look and nothing else."""

import re

from sqlalchemy import text

from db.errors import DatabaseError, shown
from db.readonly import STATEMENT_TIMEOUT_MS
from db.session import Database

NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")


def grant_readonly(database: Database, role: str) -> None:
    """Let an existing role SELECT every table and view, those to come included, in read-only transactions that end.

    Raises `DatabaseError` when there is no such role, when it may do more, or when ours may not grant it.
    """
    if database.engine.dialect.name != "postgresql":
        raise DatabaseError("SQLite has no roles; `query` and the dashboard open its file read-only as it is")
    if not NAME.fullmatch(role):
        raise DatabaseError(f"{shown(role)} is no role's name; use small letters, digits and _")
    with database.engine.begin() as connection:
        found = connection.execute(
            text("SELECT rolsuper, rolcreaterole, rolcreatedb FROM pg_roles WHERE rolname = :role"), {"role": role}
        ).one_or_none()
        if found is None:
            raise DatabaseError(f"there is no role {role}; make it: CREATE ROLE {role} LOGIN PASSWORD '…'")
        if any(found):
            raise DatabaseError(
                f"role {role} may do more than look; take a role that is no superuser and makes nothing"
            )
        name = connection.scalar(text("SELECT quote_ident(current_database())"))
        for statement in (
            f"GRANT CONNECT ON DATABASE {name} TO {role}",
            f"REVOKE CREATE, TEMPORARY ON DATABASE {name} FROM {role}",
            f"GRANT USAGE ON SCHEMA public TO {role}",
            f"REVOKE CREATE ON SCHEMA public FROM {role}",
            f"REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {role}",
            f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}",
            f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO {role}",
            f"ALTER ROLE {role} SET default_transaction_read_only = on",
            f"ALTER ROLE {role} SET statement_timeout = {STATEMENT_TIMEOUT_MS}",
        ):
            connection.execute(text(statement))
