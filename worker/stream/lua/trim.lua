-- Remove the records that every group has acknowledged.
--
-- KEYS[1]      the stream
-- ARGV[1]      how long they stay after they were added, in milliseconds; 0 or none: not at all
-- Returns how many were removed.
--
-- A group needs the records that it has not read and those that it has not acknowledged. The stream may begin at the
-- smallest such id over all groups. MAXLEN is not used: it would remove records that are being scored. Without a group
-- nothing is removed. Kept records give way to new ones: above 80 % of the server's memory limit, a call removes a tenth
-- of the time that they cover.

local FULL, PART = 0.8, 0.1

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
            -- Above 2^53 a Lua number has no exact successor: keep the last record.
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

local keep = tonumber(ARGV[1] or 0)
local first = keep > 0 and redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
if first then
    local time = redis.call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    local from = now - keep
    local memory = redis.pcall('INFO', 'memory')
    if type(memory) == 'string' then
        local used = tonumber(string.match(memory, 'used_memory:(%d+)') or 0)
        local limit = tonumber(string.match(memory, 'maxmemory:(%d+)') or 0)
        if limit > 0 and used > FULL * limit then
            local oldest = split(first[1])
            from = math.max(from, oldest + math.ceil((now - oldest) * PART))
        end
    end
    local kept = string.format('%.0f-0', math.max(0, from))
    needed = earlier(kept, needed) and kept or needed
end
return redis.call('XTRIM', KEYS[1], 'MINID', '=', needed)
