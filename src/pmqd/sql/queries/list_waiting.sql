-- Waiting jobs in the order in which they will run.
select j.id, j.queue_name::text, j.kind, j.status, j.priority, j.payload::jsonb, j.attempt_count, j.interruptions, j.max_attempts, j.run_at,
       j.created_at, j.updated_at, j.started_at, j.completed_at, j.failed_at, j.cancelled_at, j.worker_id, j.last_error_message, j.result,
       j.tags, j.claim_token, j.cancel_requested, j.alone
from {schema}.jobs j
where j.ready and j.status = %(status)s and (%(queue_name)s::text is null or j.queue_name = %(queue_name)s::text)
  and (%(after_id)s::uuid is null or (
    j.queue_name >= %(after_queue)s::text
    and (j.queue_name, j.priority, j.run_at, j.id) > (%(after_queue)s::text, %(after_priority)s::int, %(after_run_at)s::timestamptz,
                                                      %(after_id)s::uuid)))
order by j.queue_name, j.priority, j.run_at, j.id
limit %(limit)s
