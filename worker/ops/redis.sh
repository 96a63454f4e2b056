#!/bin/sh
# Redis for tweetscore: every write in the log, nothing thrown away when memory is full, two users and no other.
# Passwords are files in SECRETS; Redis is told their digests alone, in a file that only its user can read.
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
