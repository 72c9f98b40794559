insert into penguinmails.email_contents (hash, size, raw, headers, text, html, attachments, defects)
values (%(hash)s, %(size)s, %(raw)s, %(headers)s, %(text)s, %(html)s, %(attachments)s, %(defects)s)
on conflict (hash) do nothing
