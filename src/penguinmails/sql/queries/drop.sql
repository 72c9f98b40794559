update penguinmails.deliveries
   set state = 'skipped', ended_at = clock_timestamp(), reason = %(reason)s
 where id = any(%(ids)s) and state = 'held'
returning id
