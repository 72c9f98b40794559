-- The instances whose lease holds.
select i.id, i.host, i.pid, i.started_at, i.beat_at, i.lease_tick, t.tick - i.lease_tick as lease_age_ticks, i.queues, i.kinds, i.pools
from {schema}.instances i cross join {schema}.ticker t
where t.tick - i.lease_tick <= 30
order by i.started_at, i.id
