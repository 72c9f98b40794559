-- What was left in the database as raw bytes, read.
update penguinmails.email_contents
   set headers = %(headers)s, text = %(text)s, html = %(html)s, attachments = %(attachments)s, defects = %(defects)s
 where hash = %(hash)s
