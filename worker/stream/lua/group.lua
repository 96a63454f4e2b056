#!lua flags=allow-oom
-- Create the group at the start of the stream, and the stream if it does not exist.
--
-- KEYS[1]      the stream
-- KEYS[2]      the books, see read.lua
-- ARGV[1]      the group
-- Returns OK, also when the group exists.
--
-- Allowed when memory is full: without the group no worker can read the records that fill it.

local created = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if created['err'] and not string.find(created['err'], 'BUSYGROUP', 1, true) then
    return created
end
if not created['err'] then
    -- Records erased before the group existed do not count as vanished.
    local stream = redis.call('XINFO', 'STREAM', KEYS[1])
    local added, length
    for i = 1, #stream, 2 do
        added = stream[i] == 'entries-added' and stream[i + 1] or added
        length = stream[i] == 'length' and stream[i + 1] or length
    end
    if added then
        redis.call('HSET', KEYS[2], 'last ' .. ARGV[1], '0-0', 'settled ' .. ARGV[1], added - length)
    end
end
return redis.status_reply('OK')
