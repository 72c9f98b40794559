-- No row: it was told before, and all that follows from it was done in that transaction.
insert into penguinmails.bounces
  (id, delivery_id, address, kind, source, reason, message_id, smtp_code, enhanced_code, text)
values (%(id)s, %(delivery)s, penguinmails.address_key(%(email)s), %(kind)s, %(source)s, %(reason)s, %(message)s, %(smtp_code)s,
        %(enhanced_code)s, %(text)s)
on conflict (id) do nothing
returning id
