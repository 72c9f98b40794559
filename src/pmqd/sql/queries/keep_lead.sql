-- A leader's sign of life. One that leads without the lock takes it once the former holder's session has ended.
update {schema}.leader l set beat_tick = t.tick
from {schema}.ticker t
where l.term = %(term)s
returning case when %(locked)s then true else pg_try_advisory_lock(hashtextextended(%(lock)s, 0)) end
