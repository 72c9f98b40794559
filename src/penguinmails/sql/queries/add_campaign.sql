insert into penguinmails.campaigns (id, name, template, priority, account)
values (%(id)s, %(name)s, %(template)s, %(priority)s, %(account)s)
on conflict (id) do nothing
returning id
