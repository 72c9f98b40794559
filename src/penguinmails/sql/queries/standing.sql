-- Why an attempt may not begin.
select d.state, d.job_id, d.worker_id, d.attempts, d.attempted_at, s.reason, d.account
  from penguinmails.deliveries d
  left join penguinmails.suppressions s on s.address = penguinmails.address_key(d.email)
 where d.id = %(id)s
   for update of d
