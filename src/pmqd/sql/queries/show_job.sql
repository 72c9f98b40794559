-- One job, all its columns.
select j.id, j.queue_name::text, j.kind, j.status, j.priority, j.payload::jsonb, j.attempt_count, j.interruptions, j.max_attempts, j.run_at,
       j.created_at, j.updated_at, j.started_at, j.completed_at, j.failed_at, j.cancelled_at, j.worker_id, j.last_error_message, j.result,
       j.tags, j.claim_token, j.cancel_requested, j.alone
from {schema}.jobs j where j.id = %(id)s
