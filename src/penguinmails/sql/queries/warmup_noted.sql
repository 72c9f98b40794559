select count(*) filter (where step = 'received'), count(*) filter (where step <> 'received')
  from penguinmails.warmup_notes where account = %(account)s and day = %(day)s
