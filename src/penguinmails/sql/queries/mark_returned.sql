-- What came back after the server's yes; no row: the delivery is in another state than those that this changes.
update penguinmails.deliveries
   set state = %(state)s, reason = %(why)s, ended_at = clock_timestamp()
 where id = %(id)s and state = any(%(seen)s)
returning id
