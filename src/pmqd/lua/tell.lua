-- Writes what people look at: the live status of jobs and the ids offered lately. One call for a batch.
-- KEYS  hash  job:ID            one key for each operation
--       set   recent_jobs:NAME
-- ARGV        for each key one operation, in order:
--               h SECONDS N FIELD VALUE ...   write N values (fields and values) to the hash, which lives so long
--               d                             forget the hash
--               s SECONDS MOST N ID ...       add N ids to the set; it lives so long from its first id on, so that
--                                             nothing older is in it, and holds MOST at most
-- Returns nothing of use.
local at = 1
for k = 1, #KEYS do
  local operation = ARGV[at]
  if operation == 'h' then
    local count = tonumber(ARGV[at + 2])
    redis.call('HSET', KEYS[k], unpack(ARGV, at + 3, at + 2 + count))
    redis.call('EXPIRE', KEYS[k], ARGV[at + 1])
    at = at + 3 + count
  elseif operation == 'd' then
    redis.call('DEL', KEYS[k])
    at = at + 1
  else
    local count = tonumber(ARGV[at + 3])
    for first = at + 4, at + 3 + count, 1000 do
      redis.call('SADD', KEYS[k], unpack(ARGV, first, math.min(first + 999, at + 3 + count)))
    end
    redis.call('EXPIRE', KEYS[k], ARGV[at + 1], 'NX')
    local excess = redis.call('SCARD', KEYS[k]) - tonumber(ARGV[at + 2])
    if excess > 0 then
      redis.call('SPOP', KEYS[k], excess)
    end
    at = at + 4 + count
  end
end
return #KEYS
