-- Failed jobs, last failed first: the best of each queue, then the best of these.
select j.id, j.queue_name::text, j.kind, j.status, j.priority, j.payload::jsonb, j.attempt_count, j.interruptions, j.max_attempts, j.run_at,
       j.created_at, j.updated_at, j.started_at, j.completed_at, j.failed_at, j.cancelled_at, j.worker_id, j.last_error_message, j.result,
       j.tags, j.claim_token, j.cancel_requested, j.alone
from {schema}.job_queues q cross join lateral (
  select f.* from {schema}.jobs f
  where f.queue_name = q.name and f.failed_at is not null
    and (%(before_id)s::uuid is null or (
      f.failed_at <= %(before_at)s::timestamptz and (f.failed_at, f.id) < (%(before_at)s::timestamptz, %(before_id)s::uuid)))
  order by f.failed_at desc, f.id desc limit %(limit)s) j
where %(queue_name)s::text is null or q.name = %(queue_name)s::text
order by j.failed_at desc, j.id desc
limit %(limit)s
