-- Claims the best ready or marked rows without a hint; the function does the same checks as claim.sql.
select id, queue_name, kind, priority, payload::text, attempt_count, interruptions, max_attempts, date_part('epoch', run_at),
  date_part('epoch', created_at), tags, alone, date_part('epoch', claimed_at)
from {schema}.steal(%(queues)s::text[], %(lows)s::int[], %(highs)s::int[], %(limit)s, %(marked)s, %(token)s, %(worker_id)s, %(instance_id)s,
  %(after_stretch)s, %(after_priority)s, %(after_time)s, %(after_id)s, %(hinted)s::uuid[])
