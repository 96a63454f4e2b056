#!lua flags=allow-oom
-- Claim records that consumers have not renewed, and count those that were erased while a consumer held them.
--
-- KEYS[1]      the stream
-- KEYS[2]      the books, a hash of counters, see read.lua
-- KEYS[3]      the erased, a hash: `ID GROUP` -> the consumer that held it, empty when remove.lua deleted it
-- ARGV[1]      the group
-- ARGV[2]      the consumer
-- ARGV[3]      minimum milliseconds since the last renewal
-- ARGV[4]      maximum number of records to examine
-- ARGV[5]      start: -, or ( and an id
-- Returns the records, each as {id, fields, deliveries}, the id of the last one examined, and how many vanished.
--
-- XCLAIM removes a record that is no longer in the stream from the pending list and does not return it. A consumer that
-- holds such a record still scores and acknowledges it, so the record counts as vanished only when the consumer is gone
-- too. XAUTOCLAIM would also remove it from the list of a live consumer.

local function member(id)
    return id .. ' ' .. ARGV[1]
end

local idle = redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[3], ARGV[5], '+', ARGV[4])
local claim, deliveries = {'XCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3]}, {}
for i, row in ipairs(idle) do
    claim[5 + i] = row[1]
    deliveries[row[1]] = row[4] + 1
end
local records, vanished = {}, 0
for i, entry in ipairs(#idle > 0 and redis.call(unpack(claim)) or {}) do
    records[i] = {entry[1], entry[2], deliveries[entry[1]]}
    deliveries[entry[1]] = nil
end
for id, _ in pairs(deliveries) do
    if redis.call('HDEL', KEYS[3], member(id)) == 0 then
        vanished = vanished + 1
    end
end

-- Records that renew.lua removed from the pending list of a consumer that no longer exists.
if redis.call('HLEN', KEYS[3]) > 0 then
    local exists = {}
    for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
        exists[consumer[2]] = true
    end
    local erased = redis.call('HGETALL', KEYS[3])
    for i = 1, #erased, 2 do
        local id, group = string.match(erased[i], '^(%S+) (.*)$')
        if group == ARGV[1] and not exists[erased[i + 1]] then
            local held = erased[i + 1] == '' and #redis.call('XPENDING', KEYS[1], group, id, id, 1) == 1
            if not held then
                redis.call('HDEL', KEYS[3], erased[i])
                vanished = vanished + (erased[i + 1] == '' and 0 or 1)
            end
        end
    end
end
if vanished > 0 then
    redis.call('HINCRBY', KEYS[2], 'vanished ' .. ARGV[1], vanished)
    redis.call('HSET', KEYS[2], 'vanished_at ' .. ARGV[1], redis.call('TIME')[1])
end
return {records, #idle > 0 and idle[#idle][1] or '', vanished}
