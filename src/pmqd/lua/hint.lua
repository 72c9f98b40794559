-- A producer's own hint for a high-band job that it has just committed: it skips the migrator.
-- Not pushed where no migrator has been since Redis lost its data, nor into a list that is long already:
-- then nobody would take it out, and the migrator brings the job anyway.
-- KEYS[1]  string  pmqd:epoch
-- KEYS[2]  list    queue:NAME:high
-- ARGV[1]          the longest list that is still pushed into
-- ARGV[2..]        the ids, first to run first
-- Returns how many were pushed.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end
local room = tonumber(ARGV[1]) - redis.call('LLEN', KEYS[2])
local pushed = 0
for i = 2, math.min(#ARGV, 1 + room) do
  redis.call('LPUSH', KEYS[2], ARGV[i])
  pushed = pushed + 1
end
return pushed
