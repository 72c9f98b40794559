-- Marks as mark.sql does, and answers with one row for each list, its ids as one text: a list of ids needs no row for each job.
select place, array_to_string(ids, ' '), kinds, numbers, last_priority, last_run_at::text
from {schema}.mark_ids(%(term)s, %(queues)s::text[], %(lows)s::int[], %(highs)s::int[], %(limits)s::int[], %(most)s,
  %(after_priorities)s::int[], %(after_times)s::timestamptz[], %(after_ids)s::uuid[])
