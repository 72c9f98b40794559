-- The campaign that a day's letters are counted by.
insert into penguinmails.campaigns (id, name, template, account, state, started_at)
values (%(id)s, %(name)s, %(template)s, %(account)s, 'started', now())
on conflict (id) do nothing
