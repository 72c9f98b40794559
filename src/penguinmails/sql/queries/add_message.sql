insert into penguinmails.email_messages
  (id, message_id, content_hash, mailbox, kind, sender, recipients, subject, in_reply_to, delivery_id, sent_at)
values (%(id)s, %(message_id)s, %(hash)s, %(mailbox)s, %(kind)s, %(sender)s, %(recipients)s, %(subject)s, %(in_reply_to)s, %(delivery)s,
        %(sent_at)s)
on conflict do nothing
returning id
