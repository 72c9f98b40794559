insert into penguinmails.email_contents (hash, size, raw) values (%(hash)s, %(size)s, %(raw)s) on conflict (hash) do nothing
