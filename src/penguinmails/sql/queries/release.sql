update penguinmails.deliveries d
   set state = 'queued', job_id = released.job_id, attempt_token = null, ended_at = null, reason = null
  from unnest(%(ids)s::uuid[], %(jobs)s::uuid[]) as released(id, job_id)
 where d.id = released.id and d.state = 'held'
