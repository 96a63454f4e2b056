#!/bin/sh
# Start Redis for tweetscore: append-only file, no eviction when memory is full, and only two users.
# Passwords are files in SECRETS. Redis receives only their digests, in a file that only its user can read.
set -eu
secrets=${SECRETS:-/run/secrets}
digest() { tr -d '\n' < "$secrets/$1" | sha256sum | cut -d' ' -f1; }

umask 077
users=$(mktemp)
cat > "$users" <<END
user default off
user producer on #$(digest redis_producer) resetkeys resetchannels -@all +xadd +auth +hello +ping +select ~tweets
user worker on #$(digest redis_worker) resetkeys resetchannels &* +@all -@admin -@dangerous +info +bgrewriteaof ~tweets ~tweets:* ~scoring* ~training* ~celery* ~_kombu.* ~unacked* ~*.pidbox* ~/*
END

exec redis-server --aclfile "$users" --appendonly yes --appendfsync everysec --save '' --maxmemory-policy noeviction "$@"
