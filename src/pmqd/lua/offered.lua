-- Remembers the ids offered lately, for people.
-- KEYS[1]  set  recent_jobs:NAME
-- ARGV[1]       how long the set lives from its first id on, so that nothing older is in it (s)
-- ARGV[2]       how many ids it holds at most
-- ARGV[3..]     ids, at most 1,000
-- Returns nothing of use.
redis.call('SADD', KEYS[1], unpack(ARGV, 3))
redis.call('EXPIRE', KEYS[1], ARGV[1], 'NX')
local excess = redis.call('SCARD', KEYS[1]) - tonumber(ARGV[2])
if excess > 0 then
  redis.call('SPOP', KEYS[1], excess)
end
return excess
