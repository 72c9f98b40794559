-- Jobs of an open claim of the dead that were given back already, by somebody who died before that was counted: their crash stands in the
-- audit trail, since the claim. Their status is the one that this made: a job may have run again meanwhile, and failed of something else.
-- `offset 0`: one look by key per job, in any plan.
select j.id, j.queue_name::text, j.kind,
       case when j.status = 'failed' and j.failed_at is distinct from l.finished then 'queued' else j.status end, j.attempt_count
from unnest(%(ids)s::uuid[]) g(id)
cross join lateral (select j.* from {schema}.jobs j where j.id = g.id offset 0) j
cross join lateral (
  select l.finished
  from (select l.* from {schema}.job_logs l where l.job_id = g.id offset 0) l
  where l.status = 'crashed' and l.worker_id = %(worker_id)s and l.started >= %(claimed_at)s
  limit 1) l
