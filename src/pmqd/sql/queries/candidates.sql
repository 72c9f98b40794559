-- What a steal would look at, but for jobs that cannot be claimed. For the rare time in which there are such: per queue, by its index.
select c.id
from unnest(%(queues)s::text[]) with ordinality q(name, place)
cross join lateral (
  select j.id, j.priority, j.run_at
  from {schema}.jobs j
  where j.ready and j.queue_name = q.name and j.run_at <= now() and j.id <> all (%(without)s::uuid[])
  order by j.priority, j.run_at, j.id limit %(limit)s) c
order by case when c.priority <= 50 then 1 when c.priority <= 150 then 2 else 3 end, q.place, c.priority, c.run_at, c.id
limit %(limit)s
