-- Which life of Redis this is, told only by a server that takes what a push would write.
-- KEYS[1]  string  pmqd:epoch
-- KEYS[2]  list    pmqd:probe; it never exists, so that nothing is written
-- Returns the epoch, or nothing where there is none.
redis.call('LPUSHX', KEYS[2], '')
return redis.call('GET', KEYS[1])
