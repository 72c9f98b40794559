select raw from penguinmails.email_contents where hash = %(hash)s
