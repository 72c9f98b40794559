-- Held deliveries and what their jobs were to send; in one order, so that two who release the same do not wait in a circle.
select d.id, j.kind, j.payload, j.priority, j.tags
  from penguinmails.deliveries d
  left join {pmqd}.jobs j on j.id = d.job_id
 where d.id = any(%(ids)s) and d.state = 'held'
 order by d.id
   for update of d
