-- Remove idle consumers that hold no records from a group.
--
-- KEYS[1]      the stream
-- ARGV[1]      the group
-- ARGV[2]      minimum idle time in milliseconds
-- ARGV[3]      the only consumer to examine; all of them when missing
-- Returns how many were removed.
--
-- XGROUP DELCONSUMER also deletes the consumer's pending entries, and those records could never be claimed. So check and
-- removal are one step here, and a consumer that holds records stays. A live consumer registers again on its next read.

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
