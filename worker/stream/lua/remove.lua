#!lua flags=allow-oom
-- Delete records on request, and update the books of every group so that they do not count as vanished.
--
-- KEYS[1]      the stream
-- KEYS[2]      the books, see read.lua
-- KEYS[3]      the erased, see claim.lua
-- ARGV[1..]    record ids
-- Returns how many existed.

local groups = {}
local found = redis.pcall('XINFO', 'GROUPS', KEYS[1])
for i, fields in ipairs(found['err'] and {} or found) do
    groups[i] = {}
    for k = 1, #fields, 2 do
        groups[i][fields[k]] = fields[k + 1]
    end
end

local removed = 0
for _, id in ipairs(ARGV) do
    local unread = {}
    for i, group in ipairs(groups) do
        unread[i] = #redis.call('XRANGE', KEYS[1], '(' .. group['last-delivered-id'], id, 'COUNT', 1) == 1
    end
    if redis.call('XDEL', KEYS[1], id) == 1 then
        removed = removed + 1
        for i, group in ipairs(groups) do
            local name = group['name']
            if unread[i] then
                if redis.call('HGET', KEYS[2], 'last ' .. name) == group['last-delivered-id'] then
                    redis.call('HINCRBY', KEYS[2], 'settled ' .. name, 1)
                end
            elseif #redis.call('XPENDING', KEYS[1], name, id, id, 1) == 1 then
                redis.call('HSET', KEYS[3], id .. ' ' .. name, '')
            end
        end
    end
end
return removed
