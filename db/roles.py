"""PostgreSQL roles beside the schema's owner: one that works with the rows, one that may look and nothing else."""

import re

from sqlalchemy import Connection, text
from sqlalchemy.exc import ProgrammingError

from db.errors import DatabaseError, shown
from db.readonly import STATEMENT_TIMEOUT_MS
from db.session import Database

NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")
# The first server, as it numbers itself, that lets others than a table's owner VACUUM it.
MAINTAIN_SINCE = 170_000


def grant_worker(database: Database, role: str) -> None:
    """Let an existing role read and write rows of every table, those to come included, and change no schema.

    From PostgreSQL 17 on it may also VACUUM them, which `tweetscore delete` does. Raises as `grant_readonly`.
    """
    _grant(
        database,
        role,
        "GRANT CONNECT ON DATABASE {database} TO {role}",
        "GRANT USAGE ON SCHEMA public TO {role}",
        "GRANT SELECT, INSERT, UPDATE, DELETE{maintain} ON ALL TABLES IN SCHEMA public TO {role}",
        "GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {role}",
        "ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT, INSERT, UPDATE, DELETE{maintain} ON TABLES TO {role}",
        "ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT USAGE ON SEQUENCES TO {role}",
        "REVOKE INSERT, UPDATE, DELETE{maintain} ON alembic_version, schema_compatibility FROM {role}",
    )


def grant_readonly(database: Database, role: str) -> None:
    """Let an existing role SELECT every table and view, those to come included, in read-only transactions that end.

    Raises `DatabaseError` when there is no such role, when it may do more, or when ours may not grant it.
    """
    _grant(
        database,
        role,
        "GRANT CONNECT ON DATABASE {database} TO {role}",
        "REVOKE CREATE, TEMPORARY ON DATABASE {database} FROM {role}",
        "GRANT USAGE ON SCHEMA public TO {role}",
        "REVOKE CREATE ON SCHEMA public FROM {role}",
        "REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {role}",
        "GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}",
        "ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO {role}",
        habits={"default_transaction_read_only": "on", "statement_timeout": str(STATEMENT_TIMEOUT_MS)},
    )


def _grant(database: Database, role: str, *statements: str, habits: dict[str, str] | None = None) -> None:
    if database.engine.dialect.name != "postgresql":
        raise DatabaseError("SQLite has no roles; `query` and the dashboard open its file read-only as it is")
    if not NAME.fullmatch(role):
        raise DatabaseError(f"{shown(role)} is no role's name; use small letters, digits and _")
    try:
        with database.engine.begin() as connection:
            known = _habits(connection, role)
            name = connection.scalar(text("SELECT quote_ident(current_database())"))
            version = connection.scalar(text("SELECT current_setting('server_version_num')::int"))
            maintain = ", MAINTAIN" if version >= MAINTAIN_SINCE else ""
            for statement in statements:
                connection.execute(text(statement.format(database=name, role=role, maintain=maintain)))
            for habit, value in (habits or {}).items():
                # What its maker has set already takes more rights than those of the schema's owner.
                if f"{habit}={value}" not in known:
                    connection.execute(text(f"ALTER ROLE {role} SET {habit} = {value}"))
    except ProgrammingError as error:
        raise DatabaseError(
            f"role {role} cannot be granted that: {str(error.orig).splitlines()[0]}; name the schema's owner in "
            "DATABASE_URL"
        ) from error


def _habits(connection: Connection, role: str) -> list[str]:
    """What a role has set for its sessions; raises `DatabaseError` when it is none to grant anything to."""
    found = connection.execute(
        text("SELECT rolsuper OR rolcreaterole OR rolcreatedb, rolconfig FROM pg_roles WHERE rolname = :role"),
        {"role": role},
    ).one_or_none()
    if found is None:
        raise DatabaseError(f"there is no role {role}; make it: CREATE ROLE {role} LOGIN PASSWORD '…'")
    if found[0]:
        raise DatabaseError(f"role {role} may do more than look; take a role that is no superuser and makes nothing")
    return list(found[1] or [])
