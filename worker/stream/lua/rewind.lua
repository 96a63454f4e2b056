#!lua flags=allow-oom
-- Let a group read the records since a time once more.
--
-- KEYS[1]      the stream
-- ARGV[1]      the group
-- ARGV[2]      the time in milliseconds
-- Returns the id of the first record since then, nil without any.
--
-- The group is only moved back: records that it has not read yet are not skipped. A record that a consumer holds at the
-- moment may be read by another one too; the second to store it changes nothing.

local first = redis.call('XRANGE', KEYS[1], ARGV[2], '+', 'COUNT', 1)[1]
if not first then
    return false
end

local function earlier(a, b)
    local a_ms, a_seq = string.match(a, '^(%d+)-(%d+)$')
    local b_ms, b_seq = string.match(b, '^(%d+)-(%d+)$')
    a_ms, a_seq, b_ms, b_seq = tonumber(a_ms), tonumber(a_seq), tonumber(b_ms), tonumber(b_seq)
    return a_ms < b_ms or (a_ms == b_ms and a_seq <= b_seq)
end

for _, fields in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local group = {}
    for i = 1, #fields, 2 do
        group[fields[i]] = fields[i + 1]
    end
    if group['name'] == ARGV[1] and earlier(first[1], group['last-delivered-id']) then
        -- The last possible id of the millisecond before: none of these records lies between.
        local ms = tonumber(string.match(first[1], '^(%d+)'))
        local before = ms > 0 and string.format('%.0f-18446744073709551615', ms - 1) or '0-0'
        redis.call('XGROUP', 'SETID', KEYS[1], ARGV[1], before)
    end
end
return first[1]
