#!lua flags=allow-oom
-- Make the group at the beginning of the stream, and the stream if there is none.
--
-- KEYS[1]      the stream
-- KEYS[2]      the books, see read.lua
-- ARGV[1]      the group
-- Returns OK, also when the group is there already.
--
-- Allowed when memory is full: without its group nobody could read what fills it.

local made = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if made['err'] and not string.find(made['err'], 'BUSYGROUP', 1, true) then
    return made
end
if not made['err'] then
    -- What is gone by now went before this group's time.
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
