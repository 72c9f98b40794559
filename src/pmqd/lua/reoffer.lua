-- Pushes marked rows that are in no list, at the pop end: they are the oldest, so order holds.
-- The one script that reads a list, and no more than 2,000 members of it.
-- KEYS[1]  string  pmqd:epoch
-- KEYS[2]  list    queue:NAME[:high|:low]
-- ARGV[1]          the epoch that Redis must have
-- ARGV[2..]        the ids of marked rows, first to run first, at most 2,000
-- Returns how many were missing and are pushed now, or the error PMQEPOCH, with nothing pushed.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('PMQEPOCH the epoch in Redis is another one')
end
local seen = {}
for _, member in ipairs(redis.call('LRANGE', KEYS[2], -2000, -1)) do
  if #member == 36 then
    seen[string.lower(member)] = true
  else
    local id = string.match(member, '^{%s*"id"%s*:%s*"([%x-]+)"')
    if not id then
      local fine, hint = pcall(cjson.decode, member)
      id = fine and type(hint) == 'table' and type(hint.id) == 'string' and hint.id
    end
    if id then
      seen[string.lower(id)] = true
    end
  end
end
local pushed = 0
for i = #ARGV, 2, -1 do
  if not seen[ARGV[i]] then
    seen[ARGV[i]] = true
    redis.call('RPUSH', KEYS[2], ARGV[i])
    pushed = pushed + 1
  end
end
return pushed
