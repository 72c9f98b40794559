-- No row: the day is planned already.
insert into penguinmails.warmup_days (account, day, planned) values (%(account)s, %(day)s, %(planned)s)
on conflict (account, day) do nothing
returning day
