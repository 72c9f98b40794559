select c.raw from penguinmails.email_messages m join penguinmails.email_contents c on c.hash = m.content_hash where m.id = %(id)s
