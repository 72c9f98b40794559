-- A new life for a job that has ended badly; for one that waits for its time: that time is now.
with again as (
  update {schema}.jobs j
  set status = 'queued', ready = true, run_at = now(), updated_at = now(),
      attempt_count = case when j.status = 'queued' then j.attempt_count else 0 end,
      interruptions = case when j.status = 'queued' then j.interruptions else 0 end,
      alone = j.alone and j.status = 'queued',
      started_at = case when j.status = 'queued' then j.started_at end,
      last_error_message = case when j.status = 'queued' then j.last_error_message end,
      failed_at = null, cancelled_at = null, cancel_requested = false, claim_token = null
  where j.id = %(id)s and (j.status in ('failed', 'cancelled') or (j.status = 'queued' and j.run_at > now()))
  returning j.id
)
select exists (select from again), (select j.status from {schema}.jobs j where j.id = %(id)s),
       (select {schema}.wake() where exists (select from again))
