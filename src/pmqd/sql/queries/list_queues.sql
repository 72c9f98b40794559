-- The queues with their settings.
select name::text, default_priority, max_attempts, timeout_seconds, retry_base_seconds, retry_max_seconds, is_active, paused_at, created_at,
       updated_at
from {schema}.job_queues order by name
