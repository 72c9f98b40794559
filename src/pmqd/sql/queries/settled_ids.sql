-- After a commit whose answer was lost: which of these settles are in. The claim token stays on the row until the next claim (a rescue
-- takes it away); a row that has moved on since has left its line in the audit trail.
select g.id
from unnest(%(ids)s::uuid[], %(tokens)s::uuid[], %(attempts)s::int[], %(starts)s::timestamptz[], %(workers)s::text[])
  as g(id, token, attempt_number, started, worker_id)
join {schema}.jobs j on j.id = g.id
where case when j.claim_token = g.token then j.status <> 'running'
  else exists (
    select from {schema}.job_logs l
    where l.job_id = g.id and l.worker_id = g.worker_id and l.attempt_number = g.attempt_number and l.started = g.started
      and l.status <> 'crashed')
  end
