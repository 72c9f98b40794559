-- The marked rows of a stretch of priorities in order, for a reoffer. They stand at the head of their priority; one probe per priority and
-- a bound on how far each looks, so that a backlog behind them is not read.
with recursive priorities as (
  (select j.priority from {schema}.jobs j
   where j.ready and j.queue_name = %(queue_name)s and j.priority between %(low)s and %(high)s
   order by j.queue_name, j.priority limit 1)
  union all
  select n.priority
  from priorities p cross join lateral (
    select j.priority from {schema}.jobs j
    where j.ready and j.queue_name = %(queue_name)s and j.priority > p.priority and j.priority <= %(high)s
    order by j.queue_name, j.priority limit 1) n
)
select h.id
from priorities p cross join lateral (
  select j.id, j.priority, j.run_at, j.status from {schema}.jobs j
  where j.ready and j.queue_name = %(queue_name)s and j.priority = p.priority and j.run_at <= now()
  order by j.run_at, j.id limit 10000) h
where h.status = 'migrated_to_redis'
order by h.priority, h.run_at, h.id
limit %(limit)s
