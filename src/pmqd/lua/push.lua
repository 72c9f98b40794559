-- Pushes the hints of marked rows, unless Redis is not the one that they were meant for.
-- KEYS[1]   string  pmqd:epoch
-- KEYS[2..] list    queue:NAME[:high|:low], one for each group of members
-- ARGV[1]           the epoch that Redis must have
-- ARGV[2..]         for each list: how many members, then the members, first to run first
-- Returns the length of each list afterwards, or the error PMQEPOCH, with nothing pushed.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('PMQEPOCH the epoch in Redis is another one')
end
local at = 2
local lengths = {}
for k = 2, #KEYS do
  local last = at + tonumber(ARGV[at])
  local length = 0
  at = at + 1
  while at <= last do
    -- Lua's stack holds some 8,000 values, so a long group goes in parts.
    local stop = math.min(at + 999, last)
    length = redis.call('LPUSH', KEYS[k], unpack(ARGV, at, stop))
    at = stop + 1
  end
  lengths[k - 1] = length
end
return lengths
