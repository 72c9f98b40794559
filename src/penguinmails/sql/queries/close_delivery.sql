-- Ends a delivery without an attempt: held or skipped; no row: it is not in the state that was seen, or another job's.
update penguinmails.deliveries
   set state = %(state)s, reason = %(reason)s, ended_at = clock_timestamp()
 where id = %(id)s and job_id = %(job_id)s and state = any(%(seen)s)
returning id
