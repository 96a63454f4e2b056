-- Move a taken message to the queue that Celery reads, once.
--
-- KEYS[1]      the list of taken messages
-- KEYS[2]      the queue
-- ARGV[1]      the message as it was taken
-- Returns 1, or 0 when another worker has moved it.

if redis.call('LREM', KEYS[1], 0, ARGV[1]) == 0 then
    return 0
end
redis.call('LPUSH', KEYS[2], ARGV[1])
return 1
