"""Privileges of PostgreSQL roles other than the owner of the schema: workers, and users who may only read."""

import re

from sqlalchemy import Connection, text
from sqlalchemy.exc import ProgrammingError

from db.errors import DatabaseError, shown
from db.querying.readonly import STATEMENT_TIMEOUT_MS
from db.session import Database

NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")
# `server_version_num` of the first release with the MAINTAIN privilege, which allows VACUUM.
MAINTAIN_SINCE = 170_000
PARTITION_FUNCTIONS = ("add_tweets_partition", "drop_tweets_partition")


def grant_worker(database: Database, role: str) -> None:
    """Let an existing role read and write the rows of all present and future tables, without changing the schema, and
    call the functions that add and drop partitions.

    From PostgreSQL 17 on the role may also VACUUM them, as `tweetscore delete` does. Raises the same errors as
    `grant_readonly`.
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
        *(f"GRANT EXECUTE ON FUNCTION {function} TO {{role}}" for function in PARTITION_FUNCTIONS),
        "REVOKE INSERT, UPDATE, DELETE{maintain} ON alembic_version, schema_compatibility FROM {role}",
    )


def grant_readonly(database: Database, role: str) -> None:
    """Let an existing role SELECT all present and future tables and views, read-only and with a statement timeout.

    Raises `DatabaseError` when the role does not exist or is privileged, or when the current role may not grant.
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
        settings={"default_transaction_read_only": "on", "statement_timeout": str(STATEMENT_TIMEOUT_MS)},
    )


def _grant(database: Database, role: str, *statements: str, settings: dict[str, str] | None = None) -> None:
    if database.engine.dialect.name != "postgresql":
        raise DatabaseError("SQLite has no roles; `query` and the console open its file read-only without one")
    if not NAME.fullmatch(role):
        raise DatabaseError(f"{shown(role)} is not a valid role name; use small letters, digits and _")
    try:
        with database.engine.begin() as connection:
            known = _settings(connection, role)
            name = connection.scalar(text("SELECT quote_ident(current_database())"))
            version = connection.scalar(text("SELECT current_setting('server_version_num')::int"))
            maintain = ", MAINTAIN" if version >= MAINTAIN_SINCE else ""
            for statement in statements:
                connection.execute(text(statement.format(database=name, role=role, maintain=maintain)))
            for setting, value in (settings or {}).items():
                # Changing a role needs more privileges than the schema's owner has, so an equal setting is kept.
                if f"{setting}={value}" not in known:
                    connection.execute(text(f"ALTER ROLE {role} SET {setting} = {value}"))
    except ProgrammingError as error:
        raise DatabaseError(
            f"role {role} cannot be granted this: {str(error.orig).splitlines()[0]}; name the schema's owner in "
            "DATABASE_URL"
        ) from error


def _settings(connection: Connection, role: str) -> list[str]:
    """The session settings of a role. Raises `DatabaseError` when the role does not exist or is privileged."""
    found = connection.execute(
        text("SELECT rolsuper OR rolcreaterole OR rolcreatedb, rolconfig FROM pg_roles WHERE rolname = :role"),
        {"role": role},
    ).one_or_none()
    if found is None:
        raise DatabaseError(f"there is no role {role}; create it: CREATE ROLE {role} LOGIN PASSWORD '…'")
    if found[0]:
        raise DatabaseError(f"role {role} is privileged; use a role without SUPERUSER, CREATEROLE and CREATEDB")
    return list(found[1] or [])
