#!lua flags=allow-oom
-- Count how often a suspect is scored alone.
--
-- KEYS[1]      the hash of suspects, record id -> attempts
-- ARGV[1]      the record id
-- ARGV[2]      1 before an attempt, -1 to revert an attempt that was interrupted
-- Returns the attempts so far.
--
-- Allowed when memory is full: a suspect is counted before it is scored, and would otherwise block the records behind it.

return redis.call('HINCRBY', KEYS[1], ARGV[1], ARGV[2])
