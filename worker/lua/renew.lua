#!lua flags=allow-oom
-- Renew what a consumer holds, without stealing back what was taken from it.
--
-- KEYS[1]      the stream
-- KEYS[3]      the erased, see claim.lua
-- ARGV[1]      the group
-- ARGV[2]      the consumer
-- ARGV[3..]    record ids it believes it holds
-- Returns how many of them it still does; their idle time is zero again.
--
-- A bare XCLAIM by a consumer that slept past min-idle would take its records back from the one that is scoring them
-- now. So each id is first looked up among the consumer's own pending records, and only those are claimed. JUSTID leaves
-- the delivery count alone: holding on is no new delivery.
--
-- XCLAIM takes records that are no longer in the stream off the list. Their holder has their texts and scores them; that
-- it does is noted until it acknowledges them, so that they are counted as vanished if it never does.

local held = {}
for i = 3, #ARGV do
    local own = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])
    if #own == 1 then
        held[#held + 1] = ARGV[i]
    end
end
-- unpack puts its values on Lua's stack, which is not endless.
for first = 1, #held, 1000 do
    local claim = {'XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, unpack(held, first, math.min(first + 999, #held))}
    claim[#claim + 1] = 'JUSTID'
    local there = {}
    for _, id in ipairs(redis.call(unpack(claim))) do
        there[id] = true
    end
    for i = first, math.min(first + 999, #held) do
        if not there[held[i]] then
            redis.call('HSETNX', KEYS[3], held[i] .. ' ' .. ARGV[1], ARGV[2])
        end
    end
end
return #held
