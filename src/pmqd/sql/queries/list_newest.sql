-- A page of jobs, newest id first, of a walk that is bounded: at most 'scan' rows are looked at, whether they match or not. The last row's
-- 'walked_to' is where the next page begins, null when the end was reached.
with walked as materialized (
  select j.* from {schema}.jobs j
  where (%(before)s::uuid is null or j.id < %(before)s::uuid)
  order by j.id desc limit %(scan)s
), matching as (
  select w.* from walked w
  where (%(queue_name)s::text is null or w.queue_name = %(queue_name)s::text) and (%(status)s::text is null or w.status = %(status)s::text)
  order by w.id desc limit %(limit)s
)
select j.id, j.queue_name::text, j.kind, j.status, j.priority, j.payload::jsonb, j.attempt_count, j.interruptions, j.max_attempts, j.run_at,
       j.created_at, j.updated_at, j.started_at, j.completed_at, j.failed_at, j.cancelled_at, j.worker_id, j.last_error_message, j.result,
       j.tags, j.claim_token, j.cancel_requested, j.alone, e.walked_to
from (select case when (select count(*) from matching) = %(limit)s then (select m.id from matching m order by m.id limit 1)
             when (select count(*) from walked) = %(scan)s then (select w.id from walked w order by w.id limit 1) end as walked_to) e
left join matching j on true
order by j.id desc
