-- What settle.sql does, for jobs that are all completed without a result or a delay, as nearly all are: the same guards, and
-- nothing to be worked out for each row. One row: how many were still their owner's, and their places in the arrays unless it is all.
with settled as (
  update {schema}.jobs j
  set status = 'completed', completed_at = now(), updated_at = now(), alone = false, cancel_requested = false,
      started_at = to_timestamp((%(starts)s::float8[])[width_bucket(j.id, %(ids)s::uuid[])]), last_error_message = null, result = null
  where j.id = any(%(ids)s::uuid[]) and j.id between %(lowest)s and %(highest)s
    and j.status = 'running' and j.claim_token = (%(tokens)s::uuid[])[width_bucket(j.id, %(ids)s::uuid[])]
  returning j.id, j.started_at, j.worker_id, width_bucket(j.id, %(ids)s::uuid[]) as place
), logged as (
  insert into {schema}.job_logs (job_id, attempt_number, started, finished, duration, status, worker_id)
  select s.id, (%(attempts)s::int[])[s.place], s.started_at, s.started_at + (%(durations)s::float8[])[s.place] * interval '1 s',
         (%(durations)s::float8[])[s.place], 'success', s.worker_id
  from settled s
), closed as (
  delete from {schema}.claims where token = any(%(closed)s::uuid[])
)
select count(*)::int, case when count(*) < cardinality(%(ids)s::uuid[]) then coalesce(array_agg(s.place), '{{}}') end from settled s
