#!lua flags=allow-oom
-- Make the group at the beginning of the stream, and the stream if there is none.
--
-- KEYS[1]      the stream
-- ARGV[1]      the group
-- Returns OK, also when the group is there already.
--
-- Allowed when memory is full: without its group nobody could read what fills it.

local made = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if made['err'] and not string.find(made['err'], 'BUSYGROUP', 1, true) then
    return made
end
return redis.status_reply('OK')
