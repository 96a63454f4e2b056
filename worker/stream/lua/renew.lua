#!lua flags=allow-oom
-- Reset the idle time of the records that a consumer holds, without claiming back records that it has lost.
--
-- KEYS[1]      the stream
-- KEYS[3]      the erased, see claim.lua
-- ARGV[1]      the group
-- ARGV[2]      the consumer
-- ARGV[3..]    record ids it believes it holds
-- Returns how many of them it still holds.
--
-- A plain XCLAIM by a consumer that slept past min-idle would take records back from the consumer that scores them now.
-- So only ids that are still pending with this consumer are claimed. JUSTID does not increase the delivery count.
--
-- XCLAIM removes records that are no longer in the stream from the pending list. The consumer has their payloads and
-- still scores them. KEYS[3] stores that until they are acknowledged; if that never happens they count as vanished.

local held = {}
for i = 3, #ARGV do
    local own = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])
    if #own == 1 then
        held[#held + 1] = ARGV[i]
    end
end
-- unpack puts its values on Lua's stack, whose size is limited.
for first = 1, #held, 1000 do
    local claim = {'XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, unpack(held, first, math.min(first + 999, #held))}
    claim[#claim + 1] = 'JUSTID'
    local exists = {}
    for _, id in ipairs(redis.call(unpack(claim))) do
        exists[id] = true
    end
    for i = first, math.min(first + 999, #held) do
        if not exists[held[i]] then
            redis.call('HSETNX', KEYS[3], held[i] .. ' ' .. ARGV[1], ARGV[2])
        end
    end
end
return #held
