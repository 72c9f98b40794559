-- How many hints wait in each list, in one round trip.
-- KEYS  list  queue:NAME[:high|:low]
-- Returns the lengths in the order of the keys.
local lengths = {}
for k = 1, #KEYS do
  lengths[k] = redis.call('LLEN', KEYS[k])
end
return lengths
