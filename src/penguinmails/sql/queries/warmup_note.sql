-- No row: this is known already.
insert into penguinmails.warmup_notes (account, message_id, step, day) values (%(account)s, %(message_id)s, %(step)s, %(day)s)
on conflict (account, message_id, step) do nothing
returning step
