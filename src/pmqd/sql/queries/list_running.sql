-- Running jobs, newest id first; found through their claims.
select j.id, j.queue_name::text, j.kind, j.status, j.priority, j.payload::jsonb, j.attempt_count, j.interruptions, j.max_attempts, j.run_at,
       j.created_at, j.updated_at, j.started_at, j.completed_at, j.failed_at, j.cancelled_at, j.worker_id, j.last_error_message, j.result,
       j.tags, j.claim_token, j.cancel_requested, j.alone
from {schema}.claims c cross join unnest(c.ids) held(id)
cross join lateral (select j.* from {schema}.jobs j where j.id = held.id offset 0) j  -- by key, in any plan
where j.status = 'running' and j.claim_token = c.token
  and (%(queue_name)s::text is null or j.queue_name = %(queue_name)s::text) and (%(before)s::uuid is null or j.id < %(before)s::uuid)
order by j.id desc
limit %(limit)s
