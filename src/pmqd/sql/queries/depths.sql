-- How much waits, runs and has failed per queue, each figure counted up to a limit: no scan grows with the backlog. One probe per queue
-- and priority, so that rows due later are not read when due ones are counted.
with recursive places as (
  (select j.queue_name, j.priority from {schema}.jobs j where j.ready order by j.queue_name, j.priority limit 1)
  union all
  select n.queue_name, n.priority
  from places p cross join lateral (
    (select j.queue_name, j.priority from {schema}.jobs j
     where j.ready and j.queue_name = p.queue_name and j.priority > p.priority order by j.queue_name, j.priority limit 1)
    union all
    (select j.queue_name, j.priority from {schema}.jobs j
     where j.ready and j.queue_name > p.queue_name order by j.queue_name, j.priority limit 1)
    limit 1) n
), waiting as (
  select p.queue_name::text as name, least(sum(d.amount), %(most)s)::int as ready, least(sum(l.amount), %(most)s)::int as scheduled,
         min(o.run_at) as oldest
  from places p
  cross join lateral (select count(*) as amount from (
    select from {schema}.jobs j where j.ready and j.queue_name = p.queue_name and j.priority = p.priority and j.run_at <= now()
    limit %(most)s) r) d
  cross join lateral (select count(*) as amount from (
    select from {schema}.jobs j where j.ready and j.queue_name = p.queue_name and j.priority = p.priority and j.run_at > now()
    limit %(most)s) r) l
  left join lateral (
    select j.run_at from {schema}.jobs j
    where j.ready and j.queue_name = p.queue_name and j.priority = p.priority and j.run_at <= now()
    order by j.run_at, j.id limit 1) o on true
  group by p.queue_name
), running as (
  select j.queue_name::text as name, count(*)::int as amount
  from {schema}.claims c cross join unnest(c.ids) held(id)
  cross join lateral (select j.* from {schema}.jobs j where j.id = held.id offset 0) j  -- by key, in any plan
  where j.status = 'running' and j.claim_token = c.token
  group by j.queue_name
), names as (
  select q.name::text as name from {schema}.job_queues q union select name from waiting union select name from running
)
select n.name, coalesce(w.ready, 0), coalesce(w.scheduled, 0), coalesce(r.amount, 0), f.amount,
       coalesce(greatest(extract(epoch from clock_timestamp() - w.oldest), 0), 0)::float8
from names n
left join waiting w on w.name = n.name
left join running r on r.name = n.name
cross join lateral (select count(*)::int as amount from (
  select from {schema}.jobs j where j.queue_name = n.name and j.failed_at is not null limit %(most)s) x) f
order by n.name
