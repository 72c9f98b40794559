-- Marks due rows where lists have room; the function refuses a term that has ended.
select id, queue_name, kind, priority, run_at, convert_to(item, 'UTF8')
from {schema}.mark(%(term)s, %(queues)s::text[], %(lows)s::int[], %(highs)s::int[], %(limits)s::int[], %(most)s, %(full)s)
