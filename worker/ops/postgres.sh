#!/bin/sh
# Run once, by the superuser of an empty server: the database, its owner, a role for workers, a role that may only look.
# What the latter two may do with the tables is granted by the `migrate` service, once there are some.
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
