select id, name, template, state, created_at, started_at from penguinmails.campaigns where id = %(id)s
