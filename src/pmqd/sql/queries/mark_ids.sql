-- Marks as mark.sql does, and answers with one row for each list: a list of ids needs no row for each job.
select m.queue_name, width_bucket(m.priority, %(bands)s::int[]), array_agg(m.kind order by m.number),
       string_agg(m.id::text, ' ' order by m.number)
from {schema}.mark(%(term)s, %(queues)s::text[], %(lows)s::int[], %(highs)s::int[], %(limits)s::int[], false)
  with ordinality as m(id, queue_name, kind, priority, run_at, item, number)
group by 1, 2
