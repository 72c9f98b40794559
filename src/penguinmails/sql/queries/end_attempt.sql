-- Writes what became of an attempt, also of one that was held meanwhile; no row: the delivery has gone on without it.
update penguinmails.deliveries
   set state = %(state)s, smtp_code = %(smtp_code)s, enhanced_code = %(enhanced_code)s, answer = %(answer)s, reason = %(reason)s,
       sent_at = case when %(state)s = 'sent' then clock_timestamp() end,
       ended_at = case when %(state)s in ('bounced', 'held') then clock_timestamp() end
 where id = %(id)s and attempt_token = %(token)s and state in ('sending', 'held')
returning id
