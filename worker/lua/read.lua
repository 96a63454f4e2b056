#!lua flags=allow-oom
-- Give a consumer what its group has not been given, and count what vanished before anybody was given it.
--
-- KEYS[1]      the stream
-- KEYS[2]      the books, a hash
-- ARGV[1]      the group
-- ARGV[2]      the consumer
-- ARGV[3]      how many records at most; 0 only counts
-- Returns the records, the last id that the stream gave out, and how many vanished since the last look.
--
-- A record was given to the group, or waits to be, or is gone. The books hold how many were given or are accounted for
-- otherwise (`settled`), as of the last id that was given (`last`). Once no record up to that id is left, all that are
-- gone should be those: XINFO knows how many were ever added and how many are there, and what is more vanished unread.
-- Reading is done here, in the same step, since a read passes over what vanished before it. A last id that is not the
-- books' own was read past them, by a worker of an earlier release or by hand: then they begin anew, and count nothing.
--
-- Allowed when memory is full: reading is what empties it.

local LAST, SETTLED = 'last ' .. ARGV[1], 'settled ' .. ARGV[1]

local function named(list)
    local found = {}
    for i = 1, #list, 2 do
        found[list[i]] = list[i + 1]
    end
    return found
end

local function given_last()
    local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
    for _, fields in ipairs(groups['err'] and {} or groups) do
        local group = named(fields)
        if group['name'] == ARGV[1] then
            return group['last-delivered-id']
        end
    end
end

local last = given_last()
if last == nil then
    return redis.error_reply('NOGROUP there is no such group')
end
local stream = named(redis.call('XINFO', 'STREAM', KEYS[1]))
local booked = redis.call('HMGET', KEYS[2], LAST, SETTLED)
local known = booked[1] == last
local settled, vanished = tonumber(booked[2] or 0), 0
-- A server before Redis 7 does not say how many were added: nothing is counted there.
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
return {records, stream['last-generated-id'], vanished}
