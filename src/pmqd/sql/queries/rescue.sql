-- Gives back what the dead held: every job still running under a token of theirs. Idempotent; rows are locked in id order, so that it
-- cannot deadlock with itself. Fates: charged = retry at once, interrupted, unstarted = release (see status_after(), is_refunded()).
with held as materialized (
  select c.token, unnest(c.ids) as id
  from {schema}.claims c left join {schema}.instances i on i.id = c.instance_id cross join {schema}.ticker t
  where case %(scope)s
    when 'worker' then c.worker_id = %(worker_id)s
    when 'instance' then c.instance_id = %(instance_id)s
    else i.id is null or t.tick - i.lease_tick > 32 end
), locked as materialized (
  select j.id, j.claim_token as token, j.worker_id, j.attempt_count, j.started_at,
         case coalesce(f.fate, %(default)s) when 'charged' then 'retry' when 'interrupted' then 'interrupt' else 'release' end as action,
         coalesce(f.fate, %(default)s) as fate
  from {schema}.jobs j
  join held h on h.id = j.id and h.token = j.claim_token
  left join unnest(%(fate_ids)s::uuid[], %(fates)s::text[]) as f(id, fate) on f.id = j.id
  where j.status = 'running' and (%(only)s::uuid is null or j.id = %(only)s::uuid)
  order by j.id
  for update of j
), given_back as (
  update {schema}.jobs j
  set status = {schema}.status_after(l.action, j.cancel_requested, j.attempt_count, j.max_attempts, j.interruptions),
      ready = {schema}.status_after(l.action, j.cancel_requested, j.attempt_count, j.max_attempts, j.interruptions) = 'queued',
      attempt_count = j.attempt_count - {schema}.is_refunded(l.action, j.interruptions)::int,
      interruptions = j.interruptions + (l.action = 'interrupt' and j.interruptions < 5)::int,
      alone = case l.action when 'interrupt' then %(alone)s when 'release' then j.alone else false end,
      cancel_requested = false,
      started_at = case when l.action = 'release' then null else j.started_at end,
      failed_at = case when {schema}.status_after(l.action, j.cancel_requested, j.attempt_count, j.max_attempts, j.interruptions) = 'failed'
                  then now() end,
      cancelled_at = case when {schema}.status_after(l.action, j.cancel_requested, j.attempt_count, j.max_attempts, j.interruptions)
                     = 'cancelled' then now() end,
      last_error_message = case when l.action = 'release' then j.last_error_message else %(cause)s end,
      claim_token = null,  -- the dead one's settle must not look as if it had been accepted
      updated_at = now()
  from locked l
  where j.id = l.id and j.status = 'running' and j.claim_token = l.token
  returning j.id, j.queue_name, j.kind, j.status, j.attempt_count as now_charged, l.fate, l.attempt_count, l.started_at, l.worker_id
), logged as (
  insert into {schema}.job_logs (job_id, attempt_number, started, finished, duration, status, worker_id, log_message)
  select g.id, g.attempt_count, g.started_at, now(), extract(epoch from now() - g.started_at), 'crashed', g.worker_id, %(cause)s
  from given_back g where g.fate <> 'unstarted'
)
select g.id, g.queue_name::text, g.kind, g.status, g.fate, g.now_charged,
       (select {schema}.wake() where exists (select from given_back back where back.status = 'queued'))
from given_back g
order by g.id
