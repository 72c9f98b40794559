-- The queues that live instances serve, with the jobs that can run at once there. A pool without a list serves all queues of its instance.
select s.name, coalesce(q.is_active, true) as active, sum(s.slots)::int as slots
from (
  select name, coalesce((
      select sum((p.value ->> 'processes')::int * (p.value ->> 'concurrency')::int) from jsonb_each(i.pools) p
      where coalesce(p.value -> 'queues', '[]') in ('[]', 'null') or p.value -> 'queues' ? name), 1) as slots
  from {schema}.instances i, {schema}.ticker t, unnest(i.queues) name
  where t.tick - i.lease_tick <= 30) s
left join {schema}.job_queues q on q.name = s.name
group by s.name, q.is_active
order by s.name
