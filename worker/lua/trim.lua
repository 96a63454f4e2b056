-- Remove the records that no group needs any more.
--
-- KEYS[1]      the stream
-- Returns how many were removed.
--
-- A group still needs everything it was not given yet, and everything it was given and has not acknowledged. The
-- smallest such id over all groups is where the stream may begin. Never MAXLEN: it counts, and throws away records that
-- are being scored. Without any group nothing is removed, since nobody has said that he is done.

local function split(id)
    local ms, seq = string.match(id, '^(%d+)-(%d+)$')
    return tonumber(ms), tonumber(seq)
end

local function earlier(a, b)
    local a_ms, a_seq = split(a)
    local b_ms, b_seq = split(b)
    return a_ms < b_ms or (a_ms == b_ms and a_seq < b_seq)
end

local needed = nil
local found = pcall(function()
    for _, fields in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
        local group = {}
        for i = 1, #fields, 2 do
            group[fields[i]] = fields[i + 1]
        end
        local first
        local pending = redis.call('XPENDING', KEYS[1], group['name'])
        if pending[1] > 0 then
            first = pending[2]
        else
            local ms, seq = split(group['last-delivered-id'])
            -- Past 2^53 a number of Lua's has no successor: then the last record stays.
            first = seq < 2 ^ 53 and string.format('%.0f-%.0f', ms, seq + 1) or group['last-delivered-id']
        end
        if needed == nil or earlier(first, needed) then
            needed = first
        end
    end
end)
if not found or needed == nil then
    return 0
end
return redis.call('XTRIM', KEYS[1], 'MINID', '=', needed)
