-- The lock belongs to the session and ends with the connection. A leader that gives no sign of life for more than five ticks is succeeded
-- all the same: a host that stands still keeps its sessions. The new term ends whatever the last leader still has under way.
with lock as materialized (select pg_try_advisory_lock(hashtextextended(%(lock)s, 0)) as mine)
update {schema}.leader l set term = l.term + 1, holder = %(holder)s, beat_tick = t.tick
from {schema}.ticker t, lock
where lock.mine or t.tick - l.beat_tick > 5
returning l.term, lock.mine
