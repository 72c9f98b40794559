-- Pushes the ids of marked rows, unless Redis is not the one that they were meant for. As push.lua does, with one text for each list:
-- a thousand arguments cost the client and the server more than cutting a text.
-- KEYS[1]   string  pmqd:epoch
-- KEYS[2..] list    queue:NAME[:high|:low]
-- ARGV[1]           the epoch that Redis must have
-- ARGV[2..]         for each list: ids of 36 characters with a space between them, first to run first
-- Returns the length of each list afterwards, or the error PMQEPOCH, with nothing pushed.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('PMQEPOCH the epoch in Redis is another one')
end
local lengths = {}
for k = 2, #KEYS do
  local text = ARGV[k]
  local length = 0
  -- Lua's stack holds some 8,000 values, so a long text goes in parts: of 1,000 ids.
  for first = 1, #text, 37000 do
    local ids = {}
    for at = first, math.min(first + 36999, #text), 37 do
      ids[#ids + 1] = string.sub(text, at, at + 35)
    end
    length = redis.call('LPUSH', KEYS[k], unpack(ids))
  end
  lengths[k - 1] = length
end
return lengths
