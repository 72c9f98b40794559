-- Jobs of an open claim of the dead that were given back already, by somebody who died before that was counted: their crash stands in the
-- audit trail, since the claim. `offset 0`: one look by key per job, in any plan.
select j.id, j.queue_name::text, j.kind, j.status, j.attempt_count
from unnest(%(ids)s::uuid[]) g(id)
cross join lateral (select j.* from {schema}.jobs j where j.id = g.id offset 0) j
where exists (
  select from (select l.* from {schema}.job_logs l where l.job_id = g.id offset 0) l
  where l.status = 'crashed' and l.worker_id = %(worker_id)s and l.started >= %(claimed_at)s)
