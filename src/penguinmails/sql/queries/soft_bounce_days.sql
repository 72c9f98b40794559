select count(distinct (occurred_at at time zone 'UTC')::date) from penguinmails.bounces
 where address = penguinmails.address_key(%(email)s) and kind = 'soft' and reason = any(%(reasons)s)
   and occurred_at > now() - make_interval(days => %(days)s)
