-- Writes the intent to send, if this job may: no row says that it may not, and `standing` why.
update penguinmails.deliveries as d
   set state = 'sending', attempt_token = %(token)s, attempts = d.attempts + 1, attempted_at = clock_timestamp(),
       worker_id = %(worker_id)s, message_id = %(message_id)s, smtp_code = null, enhanced_code = null, answer = null, reason = null
 where d.id = %(id)s and d.job_id = %(job_id)s
   and d.account is not distinct from %(account)s
   and (d.state in ('queued', 'deferred') or d.state = 'sending' and %(resend)s)
   and not exists (select from penguinmails.suppressions s where s.address = penguinmails.address_key(d.email))
returning d.attempts
