#!lua flags=allow-oom
-- Read new records for a consumer, and count records that were erased before the group read them.
--
-- KEYS[1]      the stream
-- KEYS[2]      the books, a hash with the counters of each group
-- ARGV[1]      the group
-- ARGV[2]      the consumer
-- ARGV[3]      maximum number of records; 0 reads none and only counts
-- Returns the records, the last id that the stream generated, how many vanished since the last call, and how many were
-- unread before this call, nil when the server does not report it.
--
-- The books store `last`, the last id that was delivered to the group, and `settled`, how many records up to it were
-- delivered or are otherwise accounted for. When the stream holds no record up to `last`, the number of records that are
-- gone, entries-added minus length in XINFO, should equal `settled`; any more were erased unread.
-- The read happens in the same script, because XREADGROUP skips erased records silently. When the group's last delivered
-- id differs from `last`, another client has read from the group: then the books start over, and nothing is counted.
--
-- Allowed when memory is full: reading leads to trimming, which frees memory.

local LAST, SETTLED = 'last ' .. ARGV[1], 'settled ' .. ARGV[1]

local function named(list)
    local found = {}
    for i = 1, #list, 2 do
        found[list[i]] = list[i + 1]
    end
    return found
end

local function last_delivered_and_lag()
    local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
    for _, fields in ipairs(groups['err'] and {} or groups) do
        local group = named(fields)
        if group['name'] == ARGV[1] then
            return group['last-delivered-id'], group['lag']
        end
    end
end

local last, lag = last_delivered_and_lag()
if last == nil then
    return redis.error_reply('NOGROUP there is no such group')
end
local stream = named(redis.call('XINFO', 'STREAM', KEYS[1]))
local booked = redis.call('HMGET', KEYS[2], LAST, SETTLED)
local known = booked[1] == last
local settled, vanished = tonumber(booked[2] or 0), 0
-- Servers before Redis 7 do not report entries-added: nothing is counted there.
if stream['entries-added'] and #redis.call('XRANGE', KEYS[1], '-', last, 'COUNT', 1) == 0 then
    local gone = stream['entries-added'] - stream['length']
    if known and gone > settled then
        vanished = gone - settled
        redis.call('HINCRBY', KEYS[2], 'vanished ' .. ARGV[1], vanished)
        redis.call('HSET', KEYS[2], 'vanished_at ' .. ARGV[1], redis.call('TIME')[1])
    end
    if not known or gone ~= settled then
        redis.call('HSET', KEYS[2], LAST, last, SETTLED, gone)
    end
    known, settled = true, gone
elseif booked[1] and not known then
    redis.call('HDEL', KEYS[2], LAST, SETTLED)
end

local records = {}
if tonumber(ARGV[3]) > 0 then
    local reply =
        redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', ARGV[3], 'STREAMS', KEYS[1], '>')
    records = reply and reply[1][2] or {}
end
if known and #records > 0 then
    redis.call('HSET', KEYS[2], LAST, records[#records][1], SETTLED, settled + #records)
end
return {records, stream['last-generated-id'], vanished, lag or false}
