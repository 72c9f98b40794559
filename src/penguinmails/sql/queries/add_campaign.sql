insert into penguinmails.campaigns (id, name, template, priority)
values (%(id)s, %(name)s, %(template)s, %(priority)s)
on conflict (id) do nothing
returning id
