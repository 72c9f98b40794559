-- Gives back what one claim of the dead held: every job that still runs under its token; then the claim is closed: no job can run under it
-- any more, for a claim and its row commit together and no token is used twice. Actions: charged = retry (at once), interrupted = interrupt,
-- unstarted = release; their rules stand in status_after() and is_refunded(). Arrays sorted by id, as in settle.sql; rows are locked in
-- id order.
with locked as materialized (
  select j.id, j.worker_id, j.attempt_count, j.started_at
  from {schema}.jobs j
  where j.id = any(%(ids)s::uuid[]) and j.id between %(lowest)s and %(highest)s and j.status = 'running' and j.claim_token = %(token)s
  order by j.id
  for update
), given_back as (
  update {schema}.jobs j
  set (status, ready, attempt_count, interruptions, alone, started_at, failed_at, cancelled_at, last_error_message) = (
        select s.status, s.status = 'queued',
               j.attempt_count - {schema}.is_refunded(g.action, j.interruptions)::int,
               j.interruptions + (g.action = 'interrupt' and j.interruptions < 5)::int,
               case g.action when 'release' then j.alone else %(alone)s end,  -- charged too: it may do it again
               case when g.action <> 'release' then j.started_at end,
               case when s.status = 'failed' then now() end,
               case when s.status = 'cancelled' then now() end,
               case when g.action = 'release' then j.last_error_message else %(cause)s end
        from (select (%(actions)s::text[])[width_bucket(j.id, %(ids)s::uuid[])] as action offset 0) g
        cross join lateral (
          select {schema}.status_after(g.action, j.cancel_requested, j.attempt_count, j.max_attempts, j.interruptions) as status
          offset 0) s),
      cancel_requested = false,
      claim_token = null,  -- the dead one's settle must not look as if it had been accepted
      updated_at = now()
  where j.id = any(array(select l.id from locked l)) and j.id between %(lowest)s and %(highest)s and j.status = 'running'
  returning j.id, j.queue_name, j.kind, j.status, j.attempt_count
), logged as (
  insert into {schema}.job_logs (job_id, attempt_number, started, finished, duration, status, worker_id, log_message)
  select l.id, l.attempt_count, l.started_at, now(), extract(epoch from now() - l.started_at), 'crashed', l.worker_id, %(cause)s
  from locked l
  where (%(actions)s::text[])[width_bucket(l.id, %(ids)s::uuid[])] <> 'release'
), closed as (
  delete from {schema}.claims where token = %(token)s and %(close)s
)
select g.id, g.queue_name::text, g.kind, g.status, g.attempt_count,
       (select {schema}.wake() where exists (select from given_back back where back.status = 'queued'))
from given_back g
order by g.id
