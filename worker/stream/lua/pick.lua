-- Take our messages out of a queue that other programs use too; their messages stay in place.
--
-- KEYS[1]      the queue, with the oldest message last
-- KEYS[2]      the list of taken messages
-- ARGV[1]      maximum number of messages to examine
-- ARGV[2..]    the names of our tasks
-- Returns how many were taken.

local ours = {}
for i = 2, #ARGV do
    ours[ARGV[i]] = true
end
local taken = 0
local found = redis.call('LRANGE', KEYS[1], -tonumber(ARGV[1]), -1)
for i = #found, 1, -1 do
    local read, message = pcall(cjson.decode, found[i])
    local headers = read and type(message) == 'table' and message['headers']
    if type(headers) == 'table' and ours[headers['task']] then
        redis.call('LREM', KEYS[1], -1, found[i])
        redis.call('LPUSH', KEYS[2], found[i])
        taken = taken + 1
    end
end
return taken
