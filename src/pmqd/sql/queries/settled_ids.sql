-- After a commit whose answer was lost: which of these settles are in, and what they made of their rows. The claim token stays on the row
-- until the next claim (a rescue takes it away); a row that has moved on since has left its line in the audit trail. `offset 0`: one look by
-- key per job, in any plan.
select g.id, g.token,
       coalesce(case l.status when 'success' then 'completed' when 'failed' then 'failed' when 'cancelled' then 'cancelled'
                  when 'retry' then 'queued' when 'released' then 'queued' end, j.status)
from unnest(%(ids)s::uuid[], %(tokens)s::uuid[], %(attempts)s::int[], %(starts)s::float8[],
            array(select jsonb_array_elements_text(%(workers)s::jsonb)))
  as g(id, token, attempt_number, started, worker_id)
cross join lateral (select j.status, j.claim_token from {schema}.jobs j where j.id = g.id offset 0) j
left join lateral (
  select min(l.status) as status
  from (select l.* from {schema}.job_logs l where l.job_id = g.id offset 0) l
  where l.worker_id = g.worker_id and l.attempt_number = g.attempt_number and l.started = to_timestamp(g.started) and l.status <> 'crashed'
) l on true
where case when j.claim_token = g.token then j.status <> 'running' else l.status is not null end
