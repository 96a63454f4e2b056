-- Take consumers off a group's list that hold nothing any more.
--
-- KEYS[1]      the stream
-- ARGV[1]      the group
-- ARGV[2]      how many milliseconds a consumer must have been silent
-- ARGV[3]      the only consumer to look at; all of them when it is missing
-- Returns how many were taken off.
--
-- XGROUP DELCONSUMER throws away what its consumer holds: those records are pending with nobody and never claimed. So
-- looking and removing are one step here, and whoever holds a record stays. A consumer that was only asleep is made again
-- by its next read.

local removed = 0
local found, consumers = pcall(redis.call, 'XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
if not found then
    return 0
end
for _, fields in ipairs(consumers) do
    local consumer = {}
    for i = 1, #fields, 2 do
        consumer[fields[i]] = fields[i + 1]
    end
    if
        consumer['pending'] == 0
        and consumer['idle'] >= tonumber(ARGV[2])
        and (ARGV[3] == nil or ARGV[3] == consumer['name'])
    then
        redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer['name'])
        removed = removed + 1
    end
end
return removed
