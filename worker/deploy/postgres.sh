#!/bin/sh
# Run once, as the superuser of an empty server. Creates the database, its owner, a role for workers and a read-only role.
# The `migrate` service grants the latter two their rights after it has created the tables.
set -eu
export SECRETS="${SECRETS:-/run/secrets}"

psql -v ON_ERROR_STOP=1 --username "${POSTGRES_USER:-postgres}" --dbname postgres <<'END'
\set owner_password `cat "$SECRETS/db_owner"`
\set worker_password `cat "$SECRETS/db_worker"`
\set reader_password `cat "$SECRETS/db_reader"`
CREATE ROLE tweetscore_owner LOGIN PASSWORD :'owner_password';
CREATE ROLE tweetscore_worker LOGIN PASSWORD :'worker_password';
CREATE ROLE tweetscore_reader LOGIN PASSWORD :'reader_password';
ALTER ROLE tweetscore_reader SET default_transaction_read_only = on;
ALTER ROLE tweetscore_reader SET statement_timeout = 60000;
CREATE DATABASE tweetscore OWNER tweetscore_owner;
REVOKE CONNECT, TEMPORARY ON DATABASE tweetscore FROM PUBLIC;
END
